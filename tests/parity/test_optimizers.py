"Optimizers against those of transformers and of torch."

import torch
from torch import nn

from ftbook.training import optimizers as training_optimizers
from ftbook.training.optimizers import AdamW8bit, Adafactor, dynamic_levels


def test_adafactor_is_theirs():
    from transformers.optimization import Adafactor as Theirs

    def run(make):
        torch.manual_seed(0)
        ps = [nn.Parameter(torch.randn(*s)) for s in ((40, 30), (30,), (2, 5, 6))]
        opt = make(ps)
        for _ in range(10):
            for p in ps:
                p.grad = torch.randn_like(p)
            opt.step()
        return ps

    ours, theirs = (
        run(lambda ps: Adafactor(ps, lr=1e-2, weight_decay=0.1)),
        run(lambda ps: Theirs(ps, lr=1e-2, weight_decay=0.1, scale_parameter=False, relative_step=False)),
    )
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() < 1e-5


def test_adafactor_keeps_means_of_rows_and_columns():
    w = nn.Parameter(torch.ones(40, 30))
    w.grad = torch.ones(40, 30)
    opt = Adafactor([w], lr=1e-2)
    opt.step()
    assert (w < 1).all()
    assert sum(t.numel() for t in opt.state[w].values() if isinstance(t, torch.Tensor) and t.numel() > 1) == 40 + 30


def test_8_bit_states_stay_close_to_adamw():
    for n in (100, 5000, 2**20 + 300):
        torch.manual_seed(0)
        a = nn.Parameter(torch.randn(n))
        b = nn.Parameter(a.detach().clone())
        x, y = AdamW8bit([a]), torch.optim.AdamW([b], lr=1e-3)
        for _ in range(5):
            a.grad = torch.randn(n)
            b.grad = a.grad.clone()
            x.step()
            y.step()
        assert (a - b).abs().max() < (1e-6 if n < training_optimizers.SMALL else 2e-3)
        assert (
            n < training_optimizers.SMALL
            or sum(t.nbytes for t in x.state[a].values() if isinstance(t, torch.Tensor)) < 2.1 * n
        )
    assert dynamic_levels(True).unique().numel() == 256
