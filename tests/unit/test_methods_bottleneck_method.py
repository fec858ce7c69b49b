"Errors and private helpers of ftbook.methods.bottleneck_method."

from fastcore.test import test_fail as check_fail
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ftbook.methods.bottleneck_method import Bottleneck
from ftbook.methods.layouts import Layout


def test_dict_1():
    for wrong, said in [
        (dict(kind='compacter'), "kind='compacter' is not known: choose one of houlsby, pfeiffer, parallel"),
        (dict(activation='sine'), 'relu, gelu'),
        (dict(bottleneck_size=0), 'at least 1'),
        (dict(scaling=0), 'never do anything'),
        (dict(init='ones'), 'zero, normal'),
    ]:
        check_fail(lambda: Bottleneck(**wrong), contains=said)


def test_small_llama_1():
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=60)

    def small_llama():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**small, num_key_value_heads=2))

    llama = small_llama()
    check_fail(
        lambda: Bottleneck('pfeiffer', 33).apply(llama),
        contains='larger than the stream of model.layers.0, which has 32 numbers',
    )
    check_fail(lambda: Bottleneck().apply(nn.Sequential(nn.Linear(2, 2))), contains='no list of modules at all')
    check_fail(lambda: Layout('attn', 'mlp', 'mlp.fc1'), contains="'mlp.fc1' lies inside feed_forward='mlp'")
    assert not hasattr(llama, 'ftbook_method') and all(p.requires_grad for p in llama.parameters())
