"Bottleneck adapters, (IA)3 and BitFit: settings, models and files that do not fit."

import json, re

import pytest, torch
from safetensors.torch import load_file, save_file
from torch import nn

from ftbook.methods import files as methods_files
from ftbook.methods import package_adapters as methods_package_adapters
from ftbook.methods.bottleneck import KINDS
from ftbook.methods.layouts import Layout, find_blocks
from ftbook.methods.bitfit import BitFit
from ftbook.methods.bottleneck_method import Bottleneck, bottlenecks
from ftbook.methods.ia3 import IA3
from ftbook.methods.package_adapters import load_from_adapters, save_for_adapters
from ftbook.methods.files import load_adapter, save_adapter
from ftbook.methods.fold import merge_, remove_
from ftbook.methods.parts import parts_of
from cases.bottleneck import (
    bart,
    batch,
    borders,
    busy,
    change_config,
    d,
    every_kind,
    every_model,
    gap,
    heads,
    logits,
    make,
    refused,
    snapshot,
    untouched,
    vocab,
)


# What may happen to a model


def test_a_stream_that_is_not_seen():
    model = Bottleneck("parallel", 4, layout=Layout("self_attn", "mlp", "post_attention_layernorm")).apply(
        make("Llama")
    )
    block = model.model.layers[0]
    with pytest.raises(RuntimeError, match="model.layers.0 saw no stream: post_attention_layernorm has to be called"):
        block.mlp(torch.randn(1, 2, d))


# Where


def test_an_unknown_block_is_refused_and_can_be_named():
    torch.manual_seed(0)
    model = bart().train()
    before, want = snapshot(model), logits(model)
    with pytest.raises(
        ValueError,
        match=(
            r"no transformer block is recognised in BartForConditionalGeneration.*Looked "
            r"for.*input_layernorm.*BartEncoderLayer with self_attn, self_attn_layer_norm, fc1, fc2, "
            r"final_layer_norm.*layout=Layout"
        ),
    ):
        Bottleneck().apply(model)
    assert untouched(model, before)
    layout = Layout("self_attn", "fc2", "fc1", "final_layer_norm")
    for kind in KINDS:
        Bottleneck(kind, 4, layout=layout).apply(model)
        assert torch.equal(logits(model), want) and not torch.equal(logits(busy(model)), want)
        remove_(model)
    with pytest.raises(ValueError, match="Looked for modules that hold exactly attn, fc2, fc1"):
        find_blocks(model, Layout("attn", "fc2", "fc1"))


def test_more_in_a_block_than_is_known():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    model = Gemma2ForCausalLM(
        Gemma2Config(
            hidden_size=d,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=vocab,
        )
    )
    with pytest.raises(ValueError, match="Gemma2DecoderLayer with .*pre_feedforward_layernorm"):
        Bottleneck().apply(model)
    mixed = make("Llama")
    mixed.model.layers[1].extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"not all of model\.layers are recognised: a LlamaDecoderLayer has .*extra"):
        Bottleneck().apply(mixed)
    assert not hasattr(mixed, "ftbook_method")


# Bad input


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(kind="compacter"), "kind='compacter' is not known.*houlsby, pfeiffer, parallel"),
        (dict(activation="sine"), "activation='sine' is not known.*relu"),
        (dict(init="ones"), "zero, normal"),
        (dict(bottleneck_size=0), "at least 1"),
        (dict(bottleneck_size=-4), "at least 1"),
        (dict(bottleneck_size=2.5), "whole number"),
        (dict(bottleneck_size=True), "bottleneck_size=True"),
        (dict(bottleneck_size="8"), "bottleneck_size='8'"),
        (dict(scaling=0), "other than 0"),
        (dict(scaling=float("nan")), "finite"),
        (dict(scaling="learned"), "scaling='learned'"),
        (dict(dropout=1), "below 1"),
        (dict(dropout=-0.1), "at least 0"),
        (dict(init_std=0), "above 0"),
        (dict(init_std=float("inf")), "finite"),
    ],
)
def test_bad_hyperparameters(wrong, said):
    with pytest.raises(ValueError, match=said):
        Bottleneck(**wrong)


@every_model
def test_a_bottleneck_wider_than_the_stream(name):
    model = make(name)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"bottleneck_size=33 is larger than the stream of .*0, which has 32 numbers"):
        Bottleneck("pfeiffer", 33).apply(model)
    assert untouched(model, before)
    Bottleneck("pfeiffer", 32).apply(model)


@pytest.mark.parametrize("method", [Bottleneck("houlsby", 4), Bottleneck("parallel", 4), IA3(), BitFit()])
def test_applied_twice(method):
    model = method.apply(make("Llama"))
    for again in (method, IA3()):
        with pytest.raises(ValueError, match="already has a method"):
            again.apply(model)


@every_kind
@every_model
def test_a_bottleneck_does_not_merge(name, kind):
    model = busy(Bottleneck(kind, 4).apply(make(name)))
    want = logits(model)
    with pytest.raises(ValueError, match="BottleneckPart cannot be merged"):
        merge_(model)
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("border", borders)
def test_files_that_do_not_fit(border, tmp_path):
    save, load, weights = borders[border]
    save(busy(Bottleneck("pfeiffer", 4).apply(make("Llama"))), tmp_path)
    torch.manual_seed(0)
    refused(load, tmp_path, make("GPT-2"), "does not fit", "has no place for")
    wide = llama_of_width(64)
    refused(load, tmp_path, wide, "is (4, 32) in the file and (4, 64) in the model") if border == "ftbook" else refused(
        load, tmp_path, wide, "(4, 32) in the file"
    )
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    whole = (tmp_path / weights).read_bytes()
    for n in (0, 4, len(whole) // 2, len(whole) - 1):
        (tmp_path / weights).write_bytes(whole[:n])
        refused(load, tmp_path, make("Llama"), f"{weights} is damaged", f"{n:,} bytes")
    (tmp_path / weights).write_bytes(whole)
    tensors = load_file(tmp_path / weights)
    name = next(k for k in tensors if "down" in k and k.endswith("weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, tmp_path / weights)
    refused(load, tmp_path, make("Llama"), name, "1 values that are NaN")
    del tensors[name]
    save_file(tensors, tmp_path / weights)
    refused(load, tmp_path, make("Llama"), "the file lacks")
    (tmp_path / weights).unlink()
    refused(load, tmp_path, make("Llama"), f"has no {weights}", error=FileNotFoundError)
    (tmp_path / "adapter_config.json").write_text("{")
    refused(load, tmp_path, make("Llama"), "is not valid JSON")
    (tmp_path / "adapter_config.json").unlink()
    refused(load, tmp_path, make("Llama"), "has no adapter_config.json", error=FileNotFoundError)
    assert config


def llama_of_width(width):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=2,
            vocab_size=vocab,
        )
    )


@pytest.mark.parametrize("border", borders)
def test_nan_is_not_saved(border, tmp_path):
    model = busy(Bottleneck("pfeiffer", 4).apply(make("Llama")))
    with torch.no_grad():
        bottlenecks(model)["model.layers.1.mlp"].up.bias[3] = float("inf")
    with pytest.raises(ValueError, match="not saved.*NaN or infinite"):
        borders[border][0](model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_saving_replaces_and_a_failure_does_not(tmp_path, monkeypatch):
    model = save_for_adapters(m := busy(Bottleneck("pfeiffer", 4).apply(make("Llama"))), tmp_path) and m
    old = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    busy(model, seed=5)

    def full(tensors, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(methods_package_adapters, "save_file", full)
    with pytest.raises(OSError, match="cannot save the adapter in .*No space left"):
        save_for_adapters(model, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old
    monkeypatch.undo()
    save_for_adapters(model, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == set(old) and (tmp_path / "adapter.safetensors").read_bytes() != old[
        "adapter.safetensors"
    ]


def test_wrong_doors(tmp_path):
    with pytest.raises(ValueError, match="no method on it"):
        save_for_adapters(make("Llama"), tmp_path / "a")
    with pytest.raises(ValueError, match="no bottleneck adapter: use `save_adapter`"):
        save_for_adapters(IA3().apply(make("Llama")), tmp_path / "a")
    model = Bottleneck("pfeiffer", 4).apply(make("Llama"))
    for name in ("a.b", ""):
        with pytest.raises(ValueError, match="without dots"):
            save_for_adapters(model, tmp_path / "a", name)
    assert not (tmp_path / "a").exists()
    save_adapter(model, tmp_path / "ours")
    refused(load_from_adapters, tmp_path / "ours", make("Llama"), "use `load_adapter`")
    save_for_adapters(model, tmp_path / "theirs")
    refused(load_adapter, tmp_path / "theirs", make("Llama"), "no peft_type")
    with pytest.raises(ValueError, match="already has a method"):
        load_from_adapters(model, tmp_path / "theirs")


@pytest.mark.parametrize(
    "field, value",
    [
        ("ln_before", True),
        ("ln_after", True),
        ("use_gating", True),
        ("residual_before_ln", "post_add"),
        ("original_ln_after", False),
        ("original_ln_before", False),
        ("phm_layer", True),
        ("inv_adapter", "nice"),
        ("cross_adapter", True),
        ("leave_out", [0]),
        ("stochastic_depth", 0.1),
        ("scaling", "learned"),
        ("scaling", "channel"),
        ("reduction_factor", {"0": 2, "default": 4}),
        ("mh_adapter", True),
        ("output_adapter", False),
        ("adapter_residual_before_ln", True),
        ("a_field_of_next_year", 7),
    ],
)
def test_fields_of_the_package_that_would_change_the_result(field, value, tmp_path):
    save_for_adapters(Bottleneck("pfeiffer", 4).apply(make("Llama")), tmp_path)
    change_config(tmp_path, **{field: value})
    refused(load_from_adapters, tmp_path, make("Llama"), "adapter_config.json", f"{field}=")


def test_fields_of_the_package_that_would_not(tmp_path):
    model = busy(Bottleneck("pfeiffer", 4).apply(make("Llama")))
    save_for_adapters(model, tmp_path)
    change_config(
        tmp_path,
        init_weights="bert",
        phm_dim=4,
        phm_rank=1,
        hypercomplex_nonlinearity="glorot-uniform",
        init_weights_seed=3,
        inv_adapter_reduction_factor=2,
    )
    assert torch.equal(logits(load_from_adapters(make("Llama"), tmp_path)), logits(model))
    for other in ({"architecture": "lora", "r": 8}, "pfeiffer"):
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "config": other}))
        refused(load_from_adapters, tmp_path, make("Llama"), "no bottleneck adapter")


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama"])
def test_saved_with_a_head_and_loaded_without(name, tmp_path):
    model = busy(Bottleneck("houlsby", 4).apply(make(name)))
    save_for_adapters(model, tmp_path)
    bare = load_from_adapters(make(name).base_model, tmp_path)
    with torch.no_grad():
        assert torch.equal(bare(batch()["input_ids"])[0], model.base_model(batch()["input_ids"])[0])
    save_for_adapters(bare, tmp_path / "bare")
    assert torch.equal(logits(load_from_adapters(make(name), tmp_path / "bare")), logits(model))


def test_an_unknown_field_of_ours(tmp_path):
    save_adapter(Bottleneck("pfeiffer", 4).apply(make("Llama")), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "gated": True}))
    refused(load_adapter, tmp_path, make("Llama"), "gated=True")


# (IA)3 and BitFit against peft


@pytest.mark.parametrize("field, value", [("exclude_modules", ["k_proj"]), ("a_field_of_next_year", 7)])
def test_ia3_fields_that_would_change_the_result(field, value, tmp_path):
    save_adapter(IA3().apply(make("Llama")), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    refused(load_adapter, tmp_path, make("Llama"), field)


def test_ia3_bad_targets():
    with pytest.raises(ValueError, match="target_modules is empty"):
        IA3([])
    with pytest.raises(ValueError, match=r"matches nothing.*q_proj \(2\)"):
        IA3(["query"]).apply(make("Llama"))
    with pytest.raises(ValueError, match="keys and values are not found by name.*There are 0, 1"):
        IA3().apply(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    model = nn.ModuleDict({"k_proj": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match="second feed-forward layers"):
        IA3().apply(model)
    assert model["k_proj"].weight.requires_grad


def test_ia3_files_that_do_not_fit(tmp_path):
    save_adapter(IA3().apply(make("Llama")), tmp_path)
    refused(load_adapter, tmp_path, llama_of_width(64), "k_proj.ia3_l is (16, 1) in the file and (32, 1) in the model")
    refused(load_adapter, tmp_path, make("GPT-2"), "does not fit")


@pytest.mark.parametrize("name", ["Llama", "T5"])
def test_a_model_whose_norms_have_no_bias_is_refused(name):
    model = make(name)
    with pytest.raises(ValueError, match="norms=True, and .* has no layer norm with a bias"):
        BitFit(norms=True).apply(model)
    assert not hasattr(model, "ftbook_method")


@pytest.mark.parametrize(
    "name, first, n",
    [
        ("Llama", "model.layers.0.self_attn.q_proj", 14),
        ("Qwen2", "model.layers.0.self_attn.o_proj", 8),
        ("T5", "encoder.block.0.layer.0.SelfAttention.q", 36),
    ],
)
def test_bitfit_without_a_bias_does_not_merge(name, first, n):
    model = busy(BitFit().apply(make(name)))
    want = logits(model)
    with pytest.raises(ValueError, match=f"{re.escape(first)} has no bias to merge into, like {n} of the layers"):
        merge_(model)
    assert not any(o.merged for o in parts_of(model).values()) and torch.equal(logits(model), want)
    if name == "Qwen2":
        some = busy(BitFit(["q_proj", "k_proj", "v_proj"]).apply(make(name)))
        want = logits(some)
        assert gap([(logits(merge_(some)), want)]) < 1e-5


def test_a_new_bias_would_be_dropped(tmp_path):
    "Why BitFit does not merge into a layer without a bias: transformers writes the new one and does not read it."
    from transformers import AutoModelForCausalLM

    model = make("Llama")
    model.model.layers[0].self_attn.q_proj.bias = nn.Parameter(torch.ones(d))
    model.save_pretrained(tmp_path)
    assert "model.layers.0.self_attn.q_proj.bias" in load_file(tmp_path / "model.safetensors")
    assert AutoModelForCausalLM.from_pretrained(tmp_path).model.layers[0].self_attn.q_proj.bias is None


def test_a_lora_is_not_taken_for_bitfit(tmp_path):
    from ftbook.methods.lora_method import LoRA  # makes LORA known

    save_adapter(busy(BitFit().apply(make("Llama"))), tmp_path)
    weights, path = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, config = load_file(weights), json.loads(path.read_text())
    first = next(k for k in tensors if k.endswith("q_proj.lora_A.weight"))
    save_file(tensors | {first: torch.ones_like(tensors[first])}, weights, metadata={methods_files.MARK: "BITFIT"})
    refused(load_adapter, tmp_path, make("Llama"), "is a LoRA and no BitFit", first)
    save_file(tensors, weights, metadata={methods_files.MARK: "BITFIT"})
    for field, value in (("r", 2), ("lora_alpha", 2), ("use_dora", True), ("rank_pattern", {"q_proj": 2})):
        path.write_text(json.dumps({**config, field: value}))
        refused(load_adapter, tmp_path, make("Llama"), f"{field}={value!r}")


def test_bitfit_bad_targets():
    with pytest.raises(ValueError, match="target_modules is empty"):
        BitFit([])
    with pytest.raises(ValueError, match=r"matches nothing.*q_proj \(2\)"):
        BitFit(["query"]).apply(make("Llama"))


def test_targets_that_would_mean_more():
    "A name that is the end of another is written so that PEFT means the one alone."
    deep = nn.ModuleDict(
        {
            "v_proj": nn.Linear(4, 4),
            "deep": nn.ModuleDict({"v_proj": nn.Linear(4, 4), "down_proj": nn.Linear(4, 4)}),
            "xdown_proj": nn.Linear(4, 4),
            "down_proj": nn.Linear(4, 4),
        }
    )
    config = IA3(r"v_proj|down_proj|xdown_proj", r"down_proj").apply(deep).ftbook_method.to_peft(deep)
    assert (
        config["target_modules"] == "v_proj|xdown_proj|down_proj"
        and config["feedforward_modules"] == "down_proj"
        and isinstance(config["feedforward_modules"], str)
    )
