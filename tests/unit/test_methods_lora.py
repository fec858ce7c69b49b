"Errors and private helpers of ftbook.methods.lora."

from fastcore.test import test_close as check_close, test_eq as check_eq
import torch
from torch import nn

from ftbook.methods.lora import LoRALinear
from ftbook.methods.low_rank import low_rank


def test_loralinear_1():
    x = torch.randn(2, 5, 48, requires_grad=True)

    def frozen_linear(n_in, n_out, bias=False):
        return nn.Linear(n_in, n_out, bias=bias).requires_grad_(False)

    with_bias = LoRALinear(frozen_linear(48, 64, bias=True), 4, 2.0)
    nn.init.normal_(with_bias.lora_B, std=0.1)
    check_close(with_bias(x), with_bias.plain(x), eps=1e-5)
    seen = []
    with_bias.base.register_forward_hook(lambda *o: seen.append(1))
    with_bias(x)
    check_eq(len(seen), 1)


def test_loralinear_2():
    x = torch.randn(2, 5, 48, requires_grad=True)

    def frozen_linear(n_in, n_out, bias=False):
        return nn.Linear(n_in, n_out, bias=bias).requires_grad_(False)

    base = frozen_linear(48, 64)
    dropping = LoRALinear(base, 4, 2.0, dropout=0.5)
    nn.init.normal_(dropping.lora_B)
    assert not torch.equal(dropping(x), dropping(x))
    assert torch.equal(dropping.eval()(x), low_rank(x, [dropping])[0])
