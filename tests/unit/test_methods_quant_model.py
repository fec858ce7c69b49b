"The quantised layer against the dense one: values, bytes, loading, merging."

import copy, json, math, warnings

import pytest, torch
import torch.nn.functional as F
from torch import nn

from ftbook.methods.lora_method import LoRA
from ftbook.methods.files import load_adapter, save_adapter
from ftbook.methods.fold import merge_, remove_
from ftbook.methods.codebooks import VALUES, bits_per_weight
from ftbook.methods.quant_layer import QuantLinear
from ftbook.methods.quant import quantize_
from ftbook.methods.quant_model import dequantize_
from ftbook.methods.nf4 import quantize_blocks, quantize_tensor
from ftbook.methods.quant_files import load_quantized
from ftbook.methods.quant_merge import merge_quantized_
from ftbook.methods.quant_model import quantizable, quantized_layers
from tiny import seeded
from cases.quant import batch, cpu, gap, grads, logits, make, shaken, small_models


def relative(w, near):
    return float((w - near).norm() / w.norm())


# Codes


@pytest.mark.parametrize("kind", list(VALUES))
@pytest.mark.parametrize("shape", [(7, 9), (256, 144), (1, 1), (33,), (1500, 1111)])
def test_every_weight_comes_back_within_half_a_step(kind, shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values, flat = VALUES[kind].sort().values, w.flatten()
    step = float((values[1:] - values[:-1]).max()) / 2
    for block_size in (32, 64, 4096):
        near = quantize_tensor(w, kind, block_size, double_quant=False).dequantize()
        absmax = (
            F.pad(flat, (0, -len(flat) % block_size))
            .view(-1, block_size)
            .abs()
            .amax(1)
            .repeat_interleave(block_size)[: len(flat)]
        )
        assert near.shape == w.shape and ((near - w).abs().flatten() <= 1.0001 * step * absmax + 1e-7).all()


def test_bits_are_what_is_stored():
    w = torch.randn(512, 2048)
    for kind in VALUES:
        for double_quant in (True, False):
            assert math.isclose(
                8 * quantize_tensor(w, kind, 64, double_quant).n_bytes / w.numel(),
                bits_per_weight(kind, 64, double_quant),
                rel_tol=1e-4,
            )


def test_quantising_needs_little_beside_the_layer():
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.untyped_storage().nbytes())
            return out

    w = torch.randn(4096, 4096)
    with Sizes():
        quantize_blocks(w, "nf4", 64)
    assert max(s for s in sizes if s != w.untyped_storage().nbytes()) < w.untyped_storage().nbytes() / 4


# The layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", list(VALUES))
def test_the_layer_is_its_dense_twin(dtype, bias, kind):
    torch.manual_seed(0)
    dense = nn.Linear(96, 40, bias=bias).requires_grad_(False)
    layer = QuantLinear.from_layer(dense, kind)
    twin = copy.deepcopy(dense)
    twin.weight.data = layer.weight
    twin = twin.to(dtype)
    x = torch.randn(2, 5, 96, dtype=dtype, requires_grad=True)
    for ours, want in zip(*([y := m(x), *torch.autograd.grad(y.float().square().sum(), x)] for m in (layer, twin))):
        assert torch.equal(ours, want) and ours.dtype == dtype


def test_under_autocast_it_runs_in_the_lower_precision():
    layer, x = QuantLinear.from_layer(nn.Linear(64, 32)), torch.randn(3, 64, requires_grad=True)
    with torch.autocast(cpu, dtype=torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    assert gap(x.grad[0], layer.weight.sum(0)) < 0.1


def test_nothing_is_kept_and_a_bias_may_be_trained():
    layer, x, kept = QuantLinear.from_layer(nn.Linear(64, 32)), torch.randn(3, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert not kept
    layer.bias.requires_grad_(True)
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((32,), 3.0))


def test_a_model_keeps_less_for_backward_than_if_it_unpacked_for_good():
    def kept(model):
        own, seen = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}, {}

        def note(t):
            s = t.untyped_storage()
            if s.data_ptr() not in own:
                seen[s.data_ptr()] = s.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            model(**batch(n=1, length=2)).loss.backward()
        return sum(seen.values())

    quant = LoRA(rank=2).apply(quantize_(make("Llama")))
    held = kept(quant)
    for o in quantized_layers(quant).values():
        o.forward = lambda x, o=o: F.linear(x, o.weight)
    # what those read needs no gradient
    needed = {
        n: o
        for n, o in quantized_layers(quant).items()
        if not any(k in n for k in ("layers.0.self_attn.q", "layers.0.self_attn.k", "layers.0.self_attn.v"))
    }
    assert kept(quant) - held == sum(4 * o.in_features * o.out_features for o in needed.values())


def test_buffers_travel():
    import safetensors.torch as st

    model = quantize_(make("Qwen2"))
    want, state = logits(model), model.state_dict()
    again = quantize_(make("Qwen2", seed=3))
    again.load_state_dict(state)
    assert torch.equal(logits(again), want)
    again = quantize_(make("Qwen2", seed=3))
    again.load_state_dict(st.load(st.save({k: v.contiguous() for k, v in state.items()})))
    assert torch.equal(logits(again), want) and torch.equal(logits(copy.deepcopy(model)), want)
    with pytest.raises(RuntimeError, match="saved as nf4 in blocks of 64, and this layer is fp4"):
        quantize_(make("Qwen2"), "fp4").load_state_dict(state)
    with pytest.raises(RuntimeError, match="nested|Missing"):
        quantize_(make("Qwen2"), double_quant=False).load_state_dict(state)


def test_a_change_of_precision_leaves_the_constants_alone():
    model = quantize_(make("Llama"))
    before = {n: t.clone() for n, t in model.state_dict().items() if n.endswith(("nested", "mean"))}
    model.to(torch.bfloat16)
    assert before and all(torch.equal(model.state_dict()[n], t) for n, t in before.items())
    assert (
        all(o.weight.dtype == torch.bfloat16 for o in quantized_layers(model).values())
        and model(**batch()).logits.dtype == torch.bfloat16
    )


def test_the_skeleton_has_the_sizes_of_the_model():
    from transformers import AutoModelForCausalLM

    model = quantize_(make("GPT-2"))
    with torch.device("meta"):
        ghost = AutoModelForCausalLM.from_config(model.config)
    quantize_(ghost)
    assert {n: (t.shape, t.dtype) for n, t in ghost.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in model.state_dict().items()
    }
    assert all(t.is_meta for n, t in ghost.state_dict().items())
    x = torch.zeros(1, 4, 64, device="meta", requires_grad=True)
    y = ghost.transformer.h[0].mlp.c_fc(x)
    y.sum().backward()
    assert y.shape == (1, 4, 256) and x.grad.shape == x.shape


# Models and methods


@pytest.mark.parametrize("name", small_models)
@pytest.mark.parametrize("kind", list(VALUES))
def test_quantised_equals_dequantised(name, kind):
    model = quantize_(make(name), kind, 32)
    names = list(quantized_layers(model))
    plain = dequantize_(copy.deepcopy(model))
    assert gap(logits(model), logits(plain)) < 1e-5 and not quantized_layers(plain)
    assert quantizable(plain) == names and {type(m) for m in plain.modules()} == {type(m) for m in make(name).modules()}


@pytest.mark.parametrize("name", small_models)
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(use_rslora=True),
        dict(use_dora=True),
        dict(init="gaussian"),
        dict(target_modules=r".*(q_proj|c_attn|\.q)"),
        dict(lora_bias=True),
    ],
    ids=lambda o: "-".join(o) or "plain",
)
def test_lora_on_quantised_equals_lora_on_dequantised(name, options):
    quant = shaken(LoRA(rank=4, alpha=8, **options).apply(quantize_(make(name))))
    plain = shaken(LoRA(rank=4, alpha=8, **options).apply(dequantize_(quantize_(make(name)))))
    assert quant.ftbook_added == plain.ftbook_added
    assert gap(logits(quant), logits(plain)) < 1e-4
    theirs = grads(plain)
    assert all(gap(g, theirs[n]) < 1e-4 * max(1, float(theirs[n].abs().max())) for n, g in grads(quant).items())


def test_adapters_cross_every_border(tmp_path):
    import peft

    ours = shaken(LoRA(rank=4, alpha=8).apply(quantize_(make("Llama"))))
    ours.name_or_path = "some/base"
    save_adapter(ours, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base" and "quant" not in json.dumps(config)
    want = logits(ours)
    for backend in ("ftbook", "bitsandbytes"):
        assert gap(logits(load_adapter(quantize_(make("Llama"), backend=backend), tmp_path)), want) < 1e-4
    assert (
        gap(logits(peft.PeftModel.from_pretrained(quantize_(make("Llama"), backend="bitsandbytes"), tmp_path)), want)
        < 1e-4
    )
    assert gap(logits(load_adapter(dequantize_(quantize_(make("Llama"))), tmp_path)), want) < 1e-4
    assert torch.equal(logits(remove_(ours)), logits(quantize_(make("Llama"))))


# What no linear layer holds


def experts(name):
    "A small mixture of experts, its experts in one parameter."
    from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

    small = dict(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts_per_tok=2,
    )
    own = (
        Qwen3MoeConfig(**small, intermediate_size=128, moe_intermediate_size=64, num_experts=8)
        if name == "Qwen3-MoE"
        else MixtralConfig(**small, intermediate_size=128, num_local_experts=4)
    )
    return seeded(lambda: AutoModelForCausalLM.from_config(own))


def stays(run):
    "What `run` says of matrices that stay as they are."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in said if "in no linear layer" in str(w.message)]


@pytest.mark.parametrize("backend", ["ftbook", "bitsandbytes"])
@pytest.mark.parametrize("name, router", [("Qwen3-MoE", 8), ("Mixtral", 4)])
def test_fused_experts_stay_dense_with_a_word(name, router, backend):
    model = experts(name)
    fused, n_router = sum(p.numel() for p in model.parameters() if p.dim() == 3), 2 * router * 64
    linear = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    (said,) = stays(lambda: quantize_(model, backend=backend))
    assert len(quantized_layers(model)) == 8
    share = f"{(fused + n_router) / (fused + n_router + linear):.0%}"
    assert (
        said.startswith(f"{share} of the numbers")
        and f"{fused + n_router:,} of them ({share})" in said
        and f"take {4 * (fused + n_router) / 2**30:.2g} GiB" in said
    )
    assert (
        f"model.layers.*.mlp.experts.gate_up_proj ({fused * 2 // 3:,}), model.layers.*.mlp.experts.down_proj "
        f"({fused // 3:,}), model.layers.*.mlp.gate.weight ({n_router:,})"
    ) in said
    assert (
        "skip=['experts']" in said and stays(lambda: quantize_(experts(name), backend=backend, skip=["experts"])) == []
    )


@pytest.mark.parametrize("name", small_models)
def test_dense_models_are_told_nothing(name):
    assert (
        stays(lambda: quantize_(make(name))) == []
        and stays(lambda: quantize_(make(name), skip=["q_proj", "c_attn", "q"])) == []
    )


@pytest.mark.parametrize("name", ["Qwen3-MoE", "Mixtral"])
def test_loading_says_it_too(name, tmp_path):
    from transformers import AutoTokenizer
    from ftbook.models.shipped import model_folder

    experts(name).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_folder("smollm2-135m")).save_pretrained(tmp_path)
    (said,) = stays(lambda: load_quantized(tmp_path, dtype="float32", device=cpu))
    assert "mlp.experts.gate_up_proj" in said


# Loading


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["5GB", "50KB"])
def test_streaming_gives_the_model_that_loading_gives(tmp_path, tied, shard):
    from transformers import AutoModelForCausalLM
    from ftbook.models.shipped import model_folder
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    make("Llama", tie_word_embeddings=tied).save_pretrained(tmp_path, max_shard_size=shard)
    AutoTokenizer.from_pretrained(model_folder("smollm2-135m")).save_pretrained(tmp_path)
    for backend in ("ftbook", "bitsandbytes"):
        model, _ = load_quantized(tmp_path, dtype="float32", device=cpu, backend=backend)
        want = quantize_(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), backend=backend)
        assert torch.equal(logits(model), logits(want)) and not any(
            p.is_meta for p in [*model.parameters(), *model.buffers()]
        )
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied and not model.training
    model, _ = load_quantized(tmp_path, dtype="bfloat16", device=cpu, skip=["down_proj"])
    assert model.dtype == torch.bfloat16 and type(model.model.layers[0].mlp.down_proj) is nn.Linear


def hub_folder(cache, repo):
    """A model as the hub's cache keeps it: files named by their contents, a snapshot that points at them, and a name
    for the snapshot."""
    from transformers import AutoTokenizer
    from ftbook.models.shipped import model_folder

    torch.manual_seed(0)
    home, commit = cache / f"models--{repo.replace('/', '--')}", "0123456789abcdef0123456789abcdef01234567"
    snapshot = home / "snapshots" / commit
    make("Llama").save_pretrained(snapshot)
    AutoTokenizer.from_pretrained(model_folder("smollm2-135m")).save_pretrained(snapshot)
    (home / "blobs").mkdir()
    for i, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blob := home / "blobs" / f"{i:040x}")
        file.symlink_to(blob)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    return snapshot


@pytest.mark.parametrize("backend", ["ftbook", "bitsandbytes"])
def test_a_hub_id_is_streamed_from_the_cache(tmp_path, monkeypatch, backend):
    from huggingface_hub import constants
    from transformers import AutoModelForCausalLM
    from ftbook.methods import quant_files as methods_quant_files

    snapshot = hub_folder(tmp_path, "someone/some-model")
    for file in (constants, __import__("huggingface_hub")._snapshot_download.constants):
        monkeypatch.setattr(file, "HF_HUB_CACHE", str(tmp_path))
    seen = []
    # it has tests of its own
    monkeypatch.setattr(methods_quant_files, "load_tokenizer", lambda name: seen.append(name))
    monkeypatch.setattr(methods_quant_files, "load_model", lambda *a, **k: pytest.fail("the whole model was loaded"))
    found = methods_quant_files._local_files("someone/some-model")
    assert found is not None and found.samefile(snapshot)
    model, _ = load_quantized("someone/some-model", dtype="float32", device=cpu, backend=backend)
    want = quantize_(AutoModelForCausalLM.from_pretrained(snapshot, dtype=torch.float32), backend=backend)
    assert (
        seen == ["someone/some-model"]
        and len(quantized_layers(model)) == 14
        and torch.equal(logits(model), logits(want))
    )


# Merging


@pytest.mark.parametrize("name", small_models)
@pytest.mark.parametrize("options", [dict(), dict(use_dora=True)], ids=["LoRA", "DoRA"])
def test_merging_three_ways(name, options, tmp_path):
    model = shaken(LoRA(rank=4, alpha=8, **options).apply(quantize_(make(name))), 0.05)
    save_adapter(model, tmp_path)
    trained = logits(model)
    ways = {
        into: merge_quantized_(copy.deepcopy(model), into, make(name) if into == "full" else None)
        for into in ("full", "dequantized", "requantized")
    }
    assert gap(logits(ways["dequantized"]), trained) < 1e-4
    assert gap(logits(ways["full"]), logits(merge_(load_adapter(make(name), tmp_path)))) < 1e-4
    again = quantize_(copy.deepcopy(ways["dequantized"]))
    assert torch.equal(logits(ways["requantized"]), logits(again)) and list(quantized_layers(again)) == list(
        quantized_layers(ways["requantized"])
    )
    assert not any(hasattr(m, "ftbook_method") for m in ways.values())
    if name == "Llama":
        assert gap(logits(ways["full"]), trained) > 1e-4 < gap(logits(ways["requantized"]), trained)


def test_modules_trained_whole_are_merged_too():
    model = LoRA(rank=4, modules_to_save=["lm_head", "norm"]).apply(quantize_(make("Llama")))
    shaken(model, 0.05)
    trained = logits(model)
    assert gap(logits(merge_quantized_(model, "dequantized")), trained) < 1e-4


# Bad input


def test_odd_layers_work():
    layer = QuantLinear.from_layer(nn.Linear(9, 7))
    assert len(layer.codes) == 32 and len(layer.absmax) == 1
    x = torch.randn(4, 9, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(4, 9), atol=1e-5)


def test_the_book_knows_a_quantised_layer():
    from ftbook.methods.targets import is_quantized
    from ftbook.methods.summary import trainable_summary
    from ftbook.models.count import count_parameters

    plain, n = make("Llama"), sum(count_parameters(make("Llama")).values())
    model = LoRA(rank=2).apply(quantize_(make("Llama")))
    assert trainable_summary(model).total == n + trainable_summary(model).trained and not any(
        map(is_quantized, plain.modules())
    )
    bnb = LoRA(rank=2).apply(quantize_(make("Llama"), backend="bitsandbytes"))
    for m in (model, bnb):
        with pytest.raises(ValueError, match="q_proj is quantised: .*merge_quantized_"):
            merge_(m)
    with pytest.raises(ValueError, match="DoRA needs the norms of the weights, and Linear4bit hides them"):
        LoRA(rank=2, use_dora=True).apply(quantize_(make("Llama"), backend="bitsandbytes"))
