"Quantised models: broken tensors, folders that are quantised already, and merges that are refused whole."

import json, math

import pytest, torch
from torch import nn

from ftbook.methods.lora_method import LoRA
from ftbook.methods.fold import merge_
from ftbook.methods.parts import parts_of
from ftbook.methods.quant import quantize_
from ftbook.methods.quant_model import dequantize_
from ftbook.methods.nf4 import quantize_tensor
from ftbook.methods.quant_files import load_quantized
from ftbook.methods.quant_merge import merge_quantized_
from ftbook.methods.quant_model import quantizable, quantized_layers
from cases.quant import cpu, logits, make, shaken


# Models and methods


def test_what_changes_frozen_weights_is_refused():
    for init in ("pissa", "olora"):
        with pytest.raises(ValueError, match="q_proj is quantised: use 'kaiming'"):
            LoRA(rank=2, init=init).apply(quantize_(make("Llama")))


# Loading


def test_streaming_names_the_tensor_that_is_broken(tmp_path):
    model = make("Llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.inf
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj has 1 values that are NaN or infinite"):
        load_quantized(tmp_path, dtype="float32", device=cpu)


def test_a_folder_that_is_quantised_already_is_refused(tmp_path):
    make("Llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(ValueError, match="quantised already"):
        load_quantized(tmp_path, device=cpu)


def test_a_hub_id_that_is_not_there_is_named(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="someone/no-such-model"):
        load_quantized("someone/no-such-model", device=cpu)


# Merging


def test_merging_is_all_or_nothing():
    model = shaken(LoRA(rank=2).apply(quantize_(make("Llama"))))
    before = logits(model)
    wrong = make("Llama")
    wrong.model.layers[1].mlp.down_proj = nn.Linear(3, 3)
    for args, said in [
        (("whole",), "say 'full'"),
        (("full",), "needs `base`"),
        (("dequantized", make("Llama")), "take none"),
        (("full", wrong), "layers.1.mlp.down_proj of 128 x 64"),
        (("full", quantize_(make("Llama"))), "in full precision"),
        (("full", make("GPT-2")), "no linear layer"),
    ]:
        with pytest.raises(ValueError, match=said):
            merge_quantized_(model, *args)
    with pytest.raises(ValueError, match="requantized"):
        merge_(model)
    assert torch.equal(logits(model), before) and len(parts_of(model)) == 14
    with pytest.raises(ValueError, match="no layer of the model is quantised"):
        merge_quantized_(LoRA(rank=2).apply(make("Llama")), "dequantized")
    with pytest.raises(ValueError, match="no method"):
        merge_quantized_(quantize_(make("Llama")), "dequantized")


# Bad input


def test_a_refusal_leaves_the_model_as_it_was():
    model = make("Llama")
    before = logits(model)
    model.model.layers[1].self_attn.o_proj.weight.data = model.model.layers[1].self_attn.o_proj.weight.data.clone()
    for args, said in [
        (dict(kind="nf3"), "choose nf4"),
        (dict(block_size=48), "one of 32"),
        (dict(block_size="64"), "one of 32"),
        (dict(backend="gptq"), "choose 'ftbook'"),
        (dict(kind="int8", backend="bitsandbytes"), "has no int8"),
        (dict(skip=["proj"], kind="nf3"), "choose nf4"),
        (dict(skip=[n for n in quantizable(model)]), "no linear layer is left"),
    ]:
        with pytest.raises(ValueError, match=said):
            quantize_(model, **args)
    assert torch.equal(logits(model), before)
    for bad in (math.nan, math.inf, -math.inf):
        broken = make("GPT-2")
        broken.transformer.h[1].mlp.c_proj.weight.data[0, 1] = bad
        with pytest.raises(ValueError, match=r"transformer.h.1.mlp.c_proj.weight has 1 values"):
            quantize_(broken)
        assert not quantized_layers(broken)
    with pytest.raises(ValueError, match="float64, and only"):
        quantize_(make("Llama").double())
    with pytest.raises(ValueError, match="uint8, and only .* quantised already"):
        quantize_tensor(torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="empty"):
        quantize_tensor(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="is not quantised"):
        dequantize_(make("Llama"))


def test_what_is_quantised_is_not_quantised_again():
    for backend in ("ftbook", "bitsandbytes"):
        model = quantize_(make("Llama"), backend=backend)
        with pytest.raises(ValueError, match="quantised already .* and 13 more"):
            quantize_(model)
    model = make("Llama")
    model.is_quantized = True
    with pytest.raises(ValueError, match=r"GgufConfig\(dequantize=True\)"):
        quantize_(model)
    with pytest.raises(ValueError, match="quantise first"):
        quantize_(LoRA(rank=2).apply(make("Llama")))
    with pytest.raises(ValueError, match="merge_quantized_"):
        dequantize_(LoRA(rank=2).apply(quantize_(make("Llama"))))
