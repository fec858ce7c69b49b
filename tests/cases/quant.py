"Small models to quantise."

import torch

from tiny import SMALL, VOCAB, gap as gap_of, grads_of, random_batch, seeded

small_models = ["Llama", "Qwen2", "GPT-2", "T5"]
cpu = "cpu"


def make(name, seed=0, **more):
    return seeded(lambda: SMALL[name](width=64, **more), seed)


def batch(**kw):
    return random_batch(VOCAB, **kw)


def gap(p, q):
    return gap_of([(p.float(), q.float())])


def logits(model):
    return model(**batch()).logits.detach()


def shaken(model, std=0.1):
    "Give every trained number another value; B must not stay zero."
    torch.manual_seed(5)
    for n in model.ftbook_added:
        p = model.get_parameter(n)
        p.data.add_(std * torch.randn_like(p))
    return model


def grads(model):
    model.zero_grad()
    model(**batch()).loss.backward()
    found = grads_of(model)
    # a bias on keys has no gradient, whatever it is
    moving = sum(g.abs().max() > 1e-8 for g in found.values())
    assert moving > 0.8 * len(found), "a comparison of zeros proves nothing"
    return found
