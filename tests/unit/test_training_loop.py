"One step of the loop against the same step written by hand."

import copy

import pytest, torch

from ftbook.data.examples import Example
from ftbook.data.isolate import isolate_
from ftbook.memory.step import small_model
from ftbook.training.loop import Loop
from ftbook.training.settings import Settings


def half_square(model, step):
    "A regulariser whose gradient is the weights themselves, as that of a weight decay of one."
    return 0.5 * sum(p.square().sum() for p in model.parameters())


def one_plain_step(model, **functions):
    rows = [Example(list(range(n, 2 * n)), [False] + [True] * (n - 1)) for n in range(5, 13)]
    settings = Settings(lr=0.1, batch_size=8, warmup=0, max_grad_norm=None, **functions)
    loop = Loop(copy.deepcopy(model), rows, settings)
    return loop.take_step(), [p.detach() for p in loop.params]


def test_a_regulariser_pulls_as_weight_decay_does():
    def decaying(groups):
        return torch.optim.SGD([g | dict(weight_decay=1.0) for g in groups])

    model = isolate_(small_model(2, vocab_size=97, hidden_size=32, intermediate_size=64))
    record, pulled = one_plain_step(model, optimizer=torch.optim.SGD, regularizer=half_square)
    _, decayed = one_plain_step(model, optimizer=decaying)
    _, free = one_plain_step(model, optimizer=torch.optim.SGD)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(pulled, decayed))
    assert not all(torch.allclose(a, b, atol=1e-6) for a, b in zip(pulled, free))
    assert record["penalty"] == pytest.approx(half_square(model, 0).item(), rel=1e-4)
