"Errors and private helpers of ftbook.methods.lora_method."

from fastcore.test import test_fail as check_fail
import math

from torch import nn

from ftbook.methods.lora_method import LoRA


def test_dict_1():
    for wrong, said in [
        (dict(rank=0), 'at least 1'),
        (dict(rank=2.5), 'a whole number'),
        (dict(alpha=0), 'above 0'),
        (dict(alpha=math.inf), 'finite'),
        (dict(dropout=1), 'below 1'),
        (dict(target_modules=[]), 'is empty'),
    ]:
        check_fail(lambda: LoRA(**wrong), contains=said)


def test_frozen_linear_1():
    def frozen_linear(n_in, n_out, bias=False):
        return nn.Linear(n_in, n_out, bias=bias).requires_grad_(False)

    plain = nn.ModuleDict({'q_proj': frozen_linear(6, 6), 'out': nn.Linear(6, 3)})
    check_fail(lambda: LoRA(rank=4).apply(plain), contains='rank=4 is larger than out')
    check_fail(lambda: LoRA(rank=2, target_modules=['query']).apply(plain), contains='q_proj (1), out (1)')
    assert plain['out'].weight.requires_grad and type(plain['q_proj']) is nn.Linear
