"Several adapters on one model: sums, lower ranks, and training after a switch."

import pytest, torch
from torch import nn

from ftbook.methods.lora_method import LoRA
from ftbook.methods.switching import add_adapter_, fewer_ranks, use_adapter_
from ftbook.methods.parts import parts_of
from cases.lora import batch, gap, make, small_models


# Several adapters


def shelf_of(name, n=3, **kw):
    "A model with adapters 'a', 'b', ... of ranks 2, 3, ..., and their deltas."
    model, deltas = make(name).eval(), {}
    for i in range(n):
        add_adapter_(model, "abc"[i], LoRA(rank=2 + i, alpha=4, seed=i, **kw))
        for o in parts_of(model).values():
            nn.init.normal_(o.lora_B, std=0.1)
    for k in "abc"[:n]:
        deltas[k] = {p: o.delta().detach() for p, o in parts_of(use_adapter_(model, k)).items()}
    return model, deltas


@pytest.mark.parametrize("name", small_models)
def test_sums_of_adapters_are_sums_of_deltas(name):
    model, deltas = shelf_of(name)
    bare = make(name).eval()(**batch()).logits
    use_adapter_(model, {"a": 0.5, "b": -1.0, "c": 2.0})
    for p, o in parts_of(model).items():
        assert gap([(o.delta(), 0.5 * deltas["a"][p] - deltas["b"][p] + 2 * deltas["c"][p])]) < 1e-5
    assert torch.equal(use_adapter_(model, None)(**batch()).logits, bare)
    for k in "cab":
        for p, o in parts_of(use_adapter_(model, k)).items():
            assert torch.equal(o.delta(), deltas[k][p])


def test_adapters_on_other_layers_add_up():
    model = make("Llama").eval()
    for k, targets in dict(a=["q_proj"], b=["q_proj", "down_proj"]).items():
        add_adapter_(model, k, LoRA(rank=2, alpha=2, target_modules=targets))
        for o in parts_of(model).values():
            nn.init.normal_(o.lora_B, std=0.1)
    use_adapter_(model, {"a": 1.0, "b": 1.0})
    ranks = {p.rpartition(".")[2]: len(o.lora_A) for p, o in parts_of(model).items()}
    assert ranks == {"q_proj": 4, "down_proj": 2}


def test_a_lower_rank_is_the_best_one():
    torch.manual_seed(0)
    a, b = torch.randn(6, 20), torch.randn(30, 6)
    low_a, low_b, values = fewer_ranks(a, b, 2)
    u, s, vt = torch.linalg.svd(b @ a)
    assert gap([(low_b @ low_a, u[:, :2] * s[:2] @ vt[:2]), (values, s[:6])]) < 1e-4


def test_training_goes_on_after_a_switch(tmp_path):
    model, _ = shelf_of("Llama", 2)
    use_adapter_(model, "a")
    first = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(first.values(), lr=0.1)
    use_adapter_(use_adapter_(model, "b"), "a")
    assert {n: id(p) for n, p in model.named_parameters() if p.requires_grad} == {n: id(p) for n, p in first.items()}
    before = model(**batch()).loss
    before.backward()
    optimizer.step()
    assert model(**batch()).loss < before
