"LoRA: settings and files that do not fit are refused, and change nothing."

import json

import pytest, torch

from ftbook.methods.lora_method import LoRA
from ftbook.methods.switching import add_adapter_, adapter_names, use_adapter_
from ftbook.methods.parts import parts_of
from ftbook.methods.files import load_adapter, save_adapter
from cases.lora import batch, gap, make, peft_twin


# Same as the library


@pytest.mark.parametrize(
    "field, value",
    [
        ("bias", "all"),
        ("bias", "lora_only"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "mica"),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", ["x"]),
        ("alora_invocation_tokens", [1]),
        ("use_bdlora", {"a": 1}),
        ("ensure_weight_tying", True),
        ("loftq_config", {"bits": 4}),
        ("trainable_token_indices", [1]),
        ("use_qalora", True),
        ("a_field_of_next_year", 7),
    ],
)
def test_fields_that_would_change_the_result_are_refused(field, value, tmp_path):
    save_adapter(LoRA(rank=4).apply(make("Llama")), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ValueError, match=field):
        load_adapter(make("Llama"), tmp_path)


# Bad input


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(rank=0), "at least 1"),
        (dict(rank=-1), "at least 1"),
        (dict(rank=1.5), "whole"),
        (dict(rank=True), "rank=True"),
        (dict(rank="8"), "rank='8'"),
        (dict(alpha=0), "alpha"),
        (dict(alpha=float("nan")), "finite"),
        (dict(alpha=float("inf")), "finite"),
        (dict(dropout=1), "below 1"),
        (dict(dropout=-0.1), "at least 0"),
        (dict(dropout=float("nan")), "dropout"),
        (dict(target_modules=[]), "empty"),
        (dict(target_modules=None), "empty"),
    ],
)
def test_bad_hyperparameters(wrong, said):
    with pytest.raises(ValueError, match=said):
        LoRA(**wrong)


def test_rank_larger_than_the_layer():
    with pytest.raises(
        ValueError, match=r"rank=17 is larger than model\.layers\.0\.self_attn\.k_proj, which maps 32 numbers to 16"
    ):
        LoRA(rank=17).apply(make("Llama"))


# Patterns, whole modules, embeddings, tied heads


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(rank_pattern={"query": 2}), "'query' matches none"),
        (dict(alpha_pattern={"x": 2}), "'x' matches none"),
        (dict(modules_to_save=["score"]), "'score' matches no module"),
        (dict(modules_to_save=["q_proj"]), "both a target and in modules_to_save"),
        (dict(layers_to_transform=[7]), "no layer is left"),
        (dict(exclude_modules=r".*"), "no layer is left"),
        (dict(target_modules=["embed_tokens"], use_dora=True), "is an embedding"),
        (dict(rank_pattern={"q_proj": 99}), "rank=99 is larger"),
        (dict(modules_to_save=["model", "norm"]), "a module that holds it"),
    ],
)
def test_what_does_not_fit_changes_nothing(wrong, said):
    model = make("Llama")
    before, kinds = {n: p.clone() for n, p in model.named_parameters()}, [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=said):
        LoRA(**{"rank": 2, **wrong}).apply(model)
    assert [type(m) for m in model.modules()] == kinds and all(
        torch.equal(p, before[n]) and p.requires_grad for n, p in model.named_parameters()
    )


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(init="best"), "init='best'"),
        (dict(init="pissa_niter_0"), "init="),
        (dict(rank_pattern={"q": 0}), "rank_pattern"),
        (dict(alpha_pattern={"q": -1}), "alpha_pattern"),
        (dict(lr_ratio=0), "lr_ratio"),
        (dict(use_dora=True, lora_bias=True), "do not go together"),
    ],
)
def test_more_bad_hyperparameters(wrong, said):
    with pytest.raises(ValueError, match=said):
        LoRA(**wrong)


def test_a_pattern_in_a_file_may_name_what_is_not_there(tmp_path):

    b = peft_twin(make("Llama"), r=4, rank_pattern={"q_proj": 2, "fc9": 3}, target_modules=["q_proj", "v_proj", "fc9"])
    b.save_pretrained(tmp_path)
    model = load_adapter(make("Llama"), tmp_path)
    assert (
        model.ftbook_method.rank_pattern == {"q_proj": 2}
        and gap([(model(**batch()).logits, b(**batch()).logits)]) < 1e-6
    )


# Several adapters


def test_what_cannot_share_a_model(tmp_path):
    model = LoRA(rank=2).apply(make("Llama"))
    add_adapter_(model, "second", LoRA(rank=2))
    assert adapter_names(model) == ["default", "second"]
    with pytest.raises(ValueError, match="name of another"):
        add_adapter_(model, "default", LoRA())
    with pytest.raises(FileNotFoundError):
        add_adapter_(model, "third", tmp_path)
    assert adapter_names(model) == ["default", "second"] and model.ftbook_active == "second"
    add_adapter_(model, "dora", LoRA(rank=2, use_dora=True))
    with pytest.raises(ValueError, match="do not add up"):
        use_adapter_(model, {"dora": 1.0, "second": 1.0})
    assert model.ftbook_active == "dora" and parts_of(model)
    begun = LoRA(rank=2, init="pissa").apply(make("Llama"))
    with pytest.raises(ValueError, match="save it"):
        add_adapter_(begun, "x", LoRA(rank=2))
