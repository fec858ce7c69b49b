"Errors of ftbook.methods.bottleneck_method and ftbook.methods.layouts."

import pytest, torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ftbook.methods.bottleneck_method import Bottleneck
from ftbook.methods.layouts import Layout


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(kind="compacter"), "kind='compacter' is not known: choose one of houlsby, pfeiffer, parallel"),
        (dict(activation="sine"), "relu, gelu"),
        (dict(bottleneck_size=0), "at least 1"),
        (dict(scaling=0), "never do anything"),
        (dict(init="ones"), "zero, normal"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_is_allowed(wrong, said):
    with pytest.raises(ValueError, match=said):
        Bottleneck(**wrong)


@pytest.fixture
def llama():
    torch.manual_seed(0)
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=60)
    return LlamaForCausalLM(LlamaConfig(**small, num_key_value_heads=2))


def test_a_bottleneck_wider_than_the_stream_leaves_the_model_alone(llama):
    with pytest.raises(ValueError, match="larger than the stream of model.layers.0, which has 32 numbers"):
        Bottleneck("pfeiffer", 33).apply(llama)
    assert not hasattr(llama, "ftbook_method") and all(p.requires_grad for p in llama.parameters())


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="no list of modules at all"):
        Bottleneck().apply(nn.Sequential(nn.Linear(2, 2)))


def test_a_stream_inside_of_the_feed_forward_is_refused():
    with pytest.raises(ValueError, match="'mlp.fc1' lies inside feed_forward='mlp'"):
        Layout("attn", "mlp", "mlp.fc1")
