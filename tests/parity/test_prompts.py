"Prompt tuning, prefix tuning and P-tuning against peft."

import copy, json

import pytest, torch
from safetensors.torch import load_file

from ftbook.methods.files import load_adapter, save_adapter
from ftbook.methods.fold import remove_
from ftbook.methods.summary import trainable_summary
from ftbook.methods.soft_method import CHILD
from ftbook.methods.prefix_tuning import PrefixTuning
from ftbook.methods.prompt_tuning import PromptTuning
from cases.prompts import bert, both_kinds, cases, compare, gap, inputs, logits, make, n, real_logits, tokens

tasks = {"BERT": "FEATURE_EXTRACTION", "T5": "SEQ_2_SEQ_LM"}


def config_of(kind, name, **more):
    import peft

    given = dict(task_type=tasks.get(name, "CAUSAL_LM"), num_virtual_tokens=n, **more)
    if name == "T5":
        given["num_transformer_submodules"] = more.get("num_transformer_submodules", 1)
    return getattr(
        peft, dict(prompt="PromptTuningConfig", prefix="PrefixTuningConfig", ptuning="PromptEncoderConfig")[kind]
    )(**given)


labels_of_cases = [
    f"{name}: {type(m).__name__}{', projected' if getattr(m, 'projection', False) else ''}" for _, name, m, _ in cases
]
every_case = pytest.mark.parametrize("kind, name, method, more", cases, ids=labels_of_cases)


def twins(kind, name, method, more, model=None):
    "The same numbers in our form and in peft's."
    import peft

    a, b = (copy.deepcopy(model) if model else make(name) for _ in range(2))
    method.apply(a)
    b = peft.get_peft_model(b, config_of(kind, name, **more))
    pairs = list(zip(*([p for p in m.parameters() if p.requires_grad] for m in (a, b))))
    assert [p.shape for p, _ in pairs] == [q.shape for _, q in pairs] and len(pairs) == len(a.ftbook_added)
    torch.manual_seed(3)
    for p, q in pairs:
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
        q.data.copy_(p.data)
    return a, b, pairs


# Same as the library


def parity_rows():
    "(what, largest differences) of soft prompts against peft."
    from ftbook.models.load import load_model

    rows = [(label, compare(*twins(*case), case[1])) for label, case in zip(labels_of_cases, cases)]
    shipped = load_model("smollm2-135m", dtype="float32", device="cpu", attention="eager")[0]
    for kind, method in dict(prompt=PromptTuning(n), prefix=PrefixTuning(n)).items():
        rows.append(
            (
                f"smollm2-135m: {type(method).__name__}",
                compare(*twins(kind, "Llama", method, {}, shipped), "Llama", steps=0),
            )
        )
    return rows


@every_case
def test_counts_like_peft(kind, name, method, more):
    a, b, _ = twins(kind, name, method, more)
    assert b.get_nb_trainable_parameters() == (trainable_summary(a).trained, trainable_summary(a).total)


@pytest.mark.parametrize(
    "how, theirs", [(dict(), {}), (dict(init="vocabulary"), dict(prompt_tuning_init="SAMPLE_VOCAB"))]
)
def test_prompt_begins_as_in_peft(how, theirs):
    import peft

    a, b = PromptTuning(n, seed=5, **how).apply(make("Llama")), make("Llama")
    torch.manual_seed(5)
    b = peft.get_peft_model(b, config_of("prompt", "Llama", **theirs))
    assert torch.equal(a.get_submodule(CHILD).embedding, b.prompt_encoder["default"].embedding.weight)


@pytest.mark.parametrize(
    "how, theirs",
    [
        (dict(), {}),
        (dict(init="zero"), dict(init_weights="zero")),
        (dict(projection=True), dict(prefix_projection=True)),
        (
            dict(projection=True, init="zero", encoder_hidden_size=9),
            dict(prefix_projection=True, init_weights="zero", encoder_hidden_size=9),
        ),
    ],
)
def test_prefix_begins_as_in_peft(how, theirs):
    import peft

    a, b = PrefixTuning(n, seed=5, **how).apply(make("Llama")), make("Llama")
    torch.manual_seed(5)
    b = peft.get_peft_model(b, config_of("prefix", "Llama", **theirs))
    pairs = list(zip(*([p for p in m.parameters() if p.requires_grad] for m in (a, b))))
    assert all(torch.equal(p, q) for p, q in pairs) and len(pairs) == len(a.ftbook_added)


def test_text_begins_as_in_peft(tmp_path):
    import peft
    from tiny import save_tiny_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, text = save_tiny_model(tmp_path / "model"), "Is it good or bad?"
    tokenizer, load = AutoTokenizer.from_pretrained(folder), lambda: AutoModelForCausalLM.from_pretrained(folder)
    for size in (3, 20):  # cut, and repeated
        a = PromptTuning(size, "text", text, tokenizer).apply(load())
        b = peft.get_peft_model(
            load(),
            peft.PromptTuningConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=size,
                prompt_tuning_init="TEXT",
                prompt_tuning_init_text=text,
                tokenizer_name_or_path=str(folder),
            ),
        )
        assert torch.equal(a.get_submodule(CHILD).embedding, b.prompt_encoder["default"].embedding.weight)
    a = PrefixTuning(4, "text", text, tokenizer).apply(load())
    b = peft.get_peft_model(load(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    peft.initialize_kv_prefix_from_text(b, tokenizer, text=text, use_chat_template=False)
    assert gap([(a.get_submodule(CHILD).embedding, b.prompt_encoder["default"].embedding.weight)]) < 1e-6


# Across the border


@every_case
def test_adapters_cross_the_border(kind, name, method, more, tmp_path):
    import peft

    a, b, _ = twins(kind, name, method, more)
    a.eval(), b.eval()
    save_adapter(a, tmp_path / "ours")
    b.save_pretrained(tmp_path / "theirs")
    there, here = (
        peft.PeftModel.from_pretrained(make(name), tmp_path / "ours").eval(),
        load_adapter(make(name), tmp_path / "theirs").eval(),
    )
    again = load_adapter(make(name), tmp_path / "ours").eval()
    given = inputs(name) | (dict(attention_mask=torch.ones(2, 12, dtype=torch.long)) if name != "T5" else {})
    want = real_logits(b, given)
    assert gap((real_logits(m, given), want) for m in (a, there, here, again)) < 1e-5
    mine, his = (json.loads((tmp_path / o / "adapter_config.json").read_text()) for o in ("ours", "theirs"))
    same = (
        "task_type",
        "num_virtual_tokens",
        "token_dim",
        "num_attention_heads",
        "num_layers",
        "num_transformer_submodules",
        "inference_mode",
        "modules_to_save",
    )
    assert {k: mine[k] for k in same} == {k: his[k] for k in same}
    assert list(load_file(tmp_path / "ours" / "adapter_model.safetensors")) == ["prompt_embeddings"]
    if kind != "ptuning":
        assert mine["peft_type"] == his["peft_type"] and set(mine) <= set(his)


def test_two_sets_of_tokens_for_an_encoder_with_a_decoder(tmp_path):
    import peft

    b = peft.get_peft_model(make("T5"), config_of("prompt", "T5", num_transformer_submodules=2)).eval()
    b.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"].shape == (2 * n, 32)
    a = load_adapter(make("T5"), tmp_path).eval()
    assert gap([(real_logits(a, inputs("T5")), real_logits(b, inputs("T5")))]) < 1e-5
    peft.get_peft_model(
        make("T5"), peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=n)
    ).save_pretrained(tmp_path / "prefix")
    with pytest.raises(ValueError, match="before the decoder"):
        load_adapter(make("T5"), tmp_path / "prefix")


@pytest.mark.parametrize("head, task", [("SequenceClassification", "SEQ_CLS"), ("TokenClassification", "TOKEN_CLS")])
def test_a_head_beside_the_prompt(head, task, tmp_path):
    import peft

    model = lambda: (torch.manual_seed(0), bert(head))[1].eval()
    b = peft.get_peft_model(model(), peft.PromptTuningConfig(task_type=task, num_virtual_tokens=n)).eval()
    a = PromptTuning(n, modules_to_save=["classifier"]).apply(model())
    for m in (a, b):
        torch.manual_seed(2)
        for p in m.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p)
    given = dict(
        input_ids=tokens(),
        attention_mask=torch.ones(2, 12, dtype=torch.long),
        token_type_ids=torch.zeros(2, 12, dtype=torch.long),
    )
    save_adapter(a, tmp_path / "ours")
    b.save_pretrained(tmp_path / "theirs")
    there, here = (
        peft.PeftModel.from_pretrained(model(), tmp_path / "ours").eval(),
        load_adapter(model(), tmp_path / "theirs").eval(),
    )
    cut = lambda t: t[:, -12:] if task == "TOKEN_CLS" else t
    assert (
        gap([(logits(a, **given), cut(logits(there, **given))), (logits(here, **given), cut(logits(b, **given)))])
        < 1e-5
    )
    assert trainable_summary(a).trained == n * 32 + 2 * 32 + 2
    remove_(a)
    assert "whole" not in str(list(dict(a.named_parameters())))


# What the caller sees


@both_kinds
def test_padding_on_the_left_moves_the_text_in_peft(method):
    kind = "prompt" if type(method) is PromptTuning else "prefix"
    a, b, _ = twins(kind, "Llama", method, {})
    ids, pad = tokens(1), torch.zeros(1, 6, dtype=torch.long)
    padded, mask = torch.cat([pad, ids], 1), torch.cat([pad, torch.ones_like(ids)], 1)
    moved = lambda m: gap(
        [
            (
                m(input_ids=padded, attention_mask=mask).logits[:, -12:],
                m(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -12:],
            )
        ]
    )
    assert moved(a) < 1e-5 < 1e-4 < moved(b)
