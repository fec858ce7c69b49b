"Errors and private helpers of ftbook.methods.quant."

from fastcore.test import test_eq as check_eq, test_fail as check_fail
import math

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ftbook.methods.fold import merge_
from ftbook.methods.lora_method import LoRA
from ftbook.methods.parts import parts_of
from ftbook.methods.quant import dequantize_, quantize_
from ftbook.methods.quant_merge import merge_quantized_
from ftbook.methods.quant_model import quantized_layers


def test_quantize_1():
    def small_llama():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=100,
            )
        ).train()

    llama = quantize_(small_llama())
    check_fail(lambda: quantize_(llama), contains='quantised already (model.layers.0.self_attn.q_proj and 13 more)')
    check_fail(lambda: quantize_(small_llama(), 'nf3'), contains='choose nf4, fp4, int4, int8')
    check_fail(lambda: quantize_(small_llama(), block_size=48), contains='must be one of 32, 64')
    check_fail(lambda: quantize_(small_llama(), 'int4', backend='bitsandbytes'), contains='bitsandbytes has no int4')
    check_fail(lambda: quantize_(small_llama().double()), contains='float64, and only float32')
    check_fail(lambda: quantize_(LoRA(rank=2).apply(small_llama())), contains='quantise first')
    check_fail(lambda: quantize_(nn.Linear(4, 4)), contains='no linear layer is left')


def test_small_llama_1():
    def small_llama():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=100,
            )
        ).train()

    def small_gpt2():
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=100, n_positions=32, bos_token_id=0, eos_token_id=0)
        ).eval()

    llama = quantize_(small_llama())
    broken = small_llama()
    broken.model.layers[1].mlp.down_proj.weight.data[3, 4] = math.nan
    check_fail(lambda: quantize_(broken), contains='model.layers.1.mlp.down_proj.weight has 1 values that are NaN')
    assert not quantized_layers(broken)
    LoRA(rank=2).apply(llama)
    check_fail(lambda: merge_(llama), contains="merges into the 'full', the 'dequantized' or the 'requantized' weights")
    check_fail(lambda: merge_quantized_(llama, 'half'), contains="say 'full'")
    check_fail(lambda: merge_quantized_(llama, 'full'), contains='needs `base`')
    check_fail(
        lambda: merge_quantized_(llama, 'full', dequantize_(quantize_(small_gpt2()))),
        contains='the base has no linear layer',
    )
    check_eq(len(parts_of(llama)), 14)


def test_small_llama_2():
    def small_llama():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=100,
            )
        ).train()

    gguf = small_llama()
    gguf.is_quantized, gguf.quantization_method = True, 'gguf'  # the marks that such a model bears
    check_fail(lambda: quantize_(gguf), contains='GgufConfig(dequantize=True)')
