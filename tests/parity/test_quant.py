"NF4 and its kin against bitsandbytes, and adapters on it against peft."

import copy

import pytest, torch
from torch import nn

from ftbook.methods.lora_method import LoRA
from ftbook.methods.codebooks import BLOCK_SIZES, VALUES, normal_float
from ftbook.methods.quant import quantize_
from ftbook.methods.nf4 import dynamic_code, quantize_blocks, quantize_constants, quantize_tensor
from ftbook.methods.quant_merge import merge_quantized_
from ftbook.methods.quant_model import quantized_layers
from cases.quant import batch, cpu, gap, grads, logits, make, shaken


# Codes

shapes = [(64, 64), (48, 100), (7, 9), (1, 33), (1, 1), (33,), (2, 3, 70), (500, 333)]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_constants_equal_bitsandbytes(kind, dtype):
    import bitsandbytes.functional as bnb

    for i, shape in enumerate(shapes):
        w = torch.randn(shape, generator=torch.Generator().manual_seed(i))
        w = (w * torch.logspace(-3, 1, w.numel()).view(shape)).to(dtype)  # blocks of very different sizes
        for block_size in BLOCK_SIZES:
            codes, absmax = quantize_blocks(w, kind, block_size)
            theirs, state = bnb.quantize_4bit(w, blocksize=block_size, quant_type=kind)
            assert torch.equal(codes, theirs.flatten()) and torch.equal(absmax, state.absmax)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_numbers_on_a_midpoint_go_where_bitsandbytes_puts_them(kind):
    import bitsandbytes.functional as bnb

    values = VALUES[kind].sort().values
    ties = torch.cat([(values[1:] + values[:-1]) / 2, torch.tensor([1.0, 0.0, -0.0])])
    # scaled by powers of two: still ties
    w = torch.stack([ties.repeat(8)[:64] * s for s in (1.0, 0.5, 4.0)])
    w[:, 0] = torch.tensor([1.0, 0.5, 4.0])
    assert torch.equal(quantize_blocks(w, kind, 64)[0], bnb.quantize_4bit(w, quant_type=kind)[0].flatten())


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 1000, 70_000])
def test_double_quantisation_equals_bitsandbytes(n):
    import bitsandbytes.functional as bnb

    for scale in (1.0, 1e-3, 1e-9):
        absmax = torch.rand(n, generator=torch.Generator().manual_seed(n)) * scale
        codes, nested, mean = quantize_constants(absmax)
        want = absmax.mean()
        theirs, state = bnb.quantize_blockwise(absmax - want, blocksize=256)
        assert torch.equal(mean, want) and torch.equal(codes, theirs) and torch.equal(nested, state.absmax)


def test_constants_that_are_all_equal_come_back():
    q = quantize_tensor(torch.ones(64, 64))
    assert (
        torch.equal(q.dequantize(), torch.ones(64, 64)) and not quantize_tensor(torch.zeros(64, 64)).dequantize().any()
    )


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_values_equal_bitsandbytes(kind, dtype, double_quant):
    import bitsandbytes.functional as bnb

    # whole blocks to a row: elsewhere its AVX-512 kernel may err
    for shape, block_size in [((64, 64), 64), ((300, 768), 64), ((300, 768), 256), ((9, 1024), 1024), ((700, 512), 32)]:
        w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        ours = quantize_tensor(w, kind, block_size, double_quant).dequantize(dtype)
        theirs = bnb.dequantize_4bit(
            *bnb.quantize_4bit(w, blocksize=block_size, quant_type=kind, compress_statistics=double_quant)
        )
        assert gap(ours, theirs) <= 1e-6 and ours.dtype == dtype


def test_the_tables_are_bitsandbytes_own():
    import bitsandbytes.functional as bnb

    assert torch.equal(normal_float(), bnb.get_4bit_type("nf4", device=cpu)) and torch.equal(
        VALUES["fp4"], bnb.get_4bit_type("fp4", device=cpu)
    )
    assert torch.equal(dynamic_code(), bnb.create_dynamic_map())


# Models and methods


@pytest.mark.parametrize("name", ["Llama", "Qwen2"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_qlora_equals_peft_with_bitsandbytes(name, kind, double_quant):
    import peft

    ours = LoRA(rank=4, alpha=8).apply(quantize_(make(name), kind, double_quant=double_quant))
    theirs = peft.get_peft_model(
        quantize_(make(name), kind, double_quant=double_quant, backend="bitsandbytes"),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    )
    assert any(type(m).__module__ == "peft.tuners.lora.bnb" for m in theirs.modules())
    shaken(ours)
    pairs = {
        n: (ours.get_parameter(n), theirs.get_parameter(f"base_model.model.{n}.default.weight"))
        for n in ours.ftbook_added
    }
    for p, q in pairs.values():
        q.data.copy_(p.data)
    assert gap(logits(ours), logits(theirs)) < 1e-4
    grads(ours), grads(theirs)
    assert max(gap(p.grad, q.grad) for p, q in pairs.values()) < 1e-4


def test_training_after_an_evaluation_is_the_same_through_bitsandbytes():
    model = LoRA(rank=4).apply(quantize_(make("Llama"), backend="bitsandbytes"))
    shaken(model)
    before = grads(model)
    with torch.no_grad():
        model.eval()(**batch())
    model.train()
    assert all(torch.equal(g, before[n]) for n, g in grads(model).items())


def test_dora_is_refused_or_right_through_bitsandbytes():
    "A layer of bitsandbytes has no weight to read; what cannot be computed must not be computed wrongly."
    with pytest.raises((ValueError, RuntimeError)):
        model = LoRA(rank=4, use_dora=True).apply(quantize_(make("Llama"), backend="bitsandbytes"))
        model(**batch())


# Merging


def test_requantised_is_what_peft_makes():
    import peft

    ours = shaken(LoRA(rank=4, alpha=8).apply(quantize_(make("Llama"))))
    theirs = peft.get_peft_model(
        quantize_(make("Llama"), backend="bitsandbytes"),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    )
    for n in ours.ftbook_added:
        theirs.get_parameter(f"base_model.model.{n}.default.weight").data.copy_(ours.get_parameter(n).data)
    ours, theirs = merge_quantized_(ours, "requantized"), theirs.merge_and_unload()
    assert all(
        torch.equal(o.codes, theirs.get_submodule(n).weight.flatten()) for n, o in quantized_layers(ours).items()
    )


def test_merging_through_bitsandbytes_and_of_some_layers_only():
    ours, other = (
        shaken(LoRA(rank=4, target_modules=["q_proj"]).apply(quantize_(make("Llama"), backend=b)))
        for b in ("ftbook", "bitsandbytes")
    )
    for into in ("dequantized", "requantized"):
        a, b = (merge_quantized_(copy.deepcopy(m), into) for m in (ours, other))
        assert gap(logits(a), logits(b)) < 1e-4 and len(quantized_layers(a)) == len(quantized_layers(b)) == 14 * (
            into == "requantized"
        )


# Bad input


def test_bitsandbytes_is_never_wrong_in_silence():
    "Rows that are no whole number of blocks: either its layer gives what ours gives, or it is refused."
    model = nn.ModuleDict({"one": nn.Linear(144, 256, bias=False)})
    ours, x = quantize_(copy.deepcopy(model)), torch.randn(3, 144, requires_grad=True)
    try:
        theirs = quantize_(copy.deepcopy(model), backend="bitsandbytes")
    except ValueError as e:
        assert "no whole number of blocks of 64" in str(e)
    else:
        assert gap(theirs["one"](x), ours["one"](x)) < 1e-4
