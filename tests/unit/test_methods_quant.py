"Errors of ftbook.methods.quant and ftbook.methods.quant_merge."

import math

import pytest, torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ftbook.methods.fold import merge_
from ftbook.methods.lora_method import LoRA
from ftbook.methods.parts import parts_of
from ftbook.methods.quant import quantize_
from ftbook.methods.quant_merge import merge_quantized_
from ftbook.methods.quant_model import dequantize_, quantized_layers


def small_llama():
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=100)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).train()


def small_gpt2():
    torch.manual_seed(0)
    sizes = dict(n_embd=32, n_layer=1, n_head=4, vocab_size=100, n_positions=32)
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda: quantize_(small_llama(), "nf3"), "choose nf4, fp4, int4, int8"),
        (lambda: quantize_(small_llama(), block_size=48), "must be one of 32, 64"),
        (lambda: quantize_(small_llama(), "int4", backend="bitsandbytes"), "bitsandbytes has no int4"),
        (lambda: quantize_(small_llama().double()), "float64, and only float32"),
        (lambda: quantize_(LoRA(rank=2).apply(small_llama())), "quantise first"),
        (lambda: quantize_(nn.Linear(4, 4)), "no linear layer is left"),
    ],
)
def test_what_cannot_be_quantised_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        wrong()


def test_a_quantised_model_is_not_quantised_again():
    llama = quantize_(small_llama())
    with pytest.raises(ValueError, match=r"quantised already \(model.layers.0.self_attn.q_proj and 13 more\)"):
        quantize_(llama)


def test_a_weight_that_is_nan_is_named_and_nothing_is_quantised():
    broken = small_llama()
    broken.model.layers[1].mlp.down_proj.weight.data[3, 4] = math.nan
    with pytest.raises(ValueError, match="model.layers.1.mlp.down_proj.weight has 1 values that are NaN"):
        quantize_(broken)
    assert not quantized_layers(broken)


def test_a_model_from_a_gguf_is_told_how_to_load_it():
    gguf = small_llama()
    gguf.is_quantized, gguf.quantization_method = True, "gguf"  # the marks that such a model bears
    with pytest.raises(ValueError, match=r"GgufConfig\(dequantize=True\)"):
        quantize_(gguf)


def test_merging_beside_quantised_layers_needs_to_know_into_what():
    llama = LoRA(rank=2).apply(quantize_(small_llama()))
    other = dequantize_(quantize_(small_gpt2()))
    for wrong, said in [
        (lambda: merge_(llama), "merges into the 'full', the 'dequantized' or the 'requantized' weights"),
        (lambda: merge_quantized_(llama, "half"), "say 'full'"),
        (lambda: merge_quantized_(llama, "full"), "needs `base`"),
        (lambda: merge_quantized_(llama, "full", other), "the base has no linear layer"),
    ]:
        with pytest.raises(ValueError, match=said):
            wrong()
    assert len(parts_of(llama)) == 14
