"The layer of ftbook.methods.lora beside autograd."

import torch
from torch import nn

from ftbook.methods.lora import LoRALinear
from ftbook.methods.low_rank import low_rank

x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))


def make(bias=False, **how):
    layer = LoRALinear(nn.Linear(48, 64, bias=bias).requires_grad_(False), 4, 2.0, **how)
    nn.init.normal_(layer.lora_B, std=0.1)
    return layer


def test_with_a_bias_in_the_base_both_ways_give_the_same():
    layer = make(bias=True)
    torch.testing.assert_close(layer(x), layer.plain(x), atol=1e-5, rtol=0)


def test_a_hook_on_the_base_is_called():
    layer, seen = make(), []
    layer.base.register_forward_hook(lambda *o: seen.append(1))
    layer(x)
    assert seen == [1]


def test_dropout_is_drawn_anew_in_training_and_off_in_evaluation():
    layer = make(dropout=0.5)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), low_rank(x, [layer])[0])
