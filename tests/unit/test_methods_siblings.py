"Layers that share their input: together they compute what each computes alone, whatever happens between them."

import copy

import pytest, torch
from torch import nn

from ftbook.methods.lora import LoRALinear
from ftbook.methods.siblings import share_siblings_
from ftbook.methods.low_rank import low_rank
from ftbook.methods.parts import parts_of
from cases.lora import at_rest, batch, families, gap, grads, lively, make, small_models


# Whatever may happen to a family


def lonely(model):
    "The same model with every layer on its own."
    for o in parts_of(model).values():
        o.leave_()
    return model


@pytest.mark.parametrize(
    "name, sizes", [("Llama", [3, 2] * 2), ("Qwen2", [3, 2] * 2), ("GPT-2", []), ("BERT", [3] * 2), ("T5", [3, 2] * 4)]
)
def test_who_is_a_sibling(name, sizes):
    model = lively(make(name))
    assert sorted(len(o.layers) for o in families(model)) == sorted(sizes)
    assert not [n for n, o in parts_of(model).items() if "EncDec" in n and o.siblings]


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("name", small_models)
def test_together_is_alone(name, dora):
    model = lively(make(name), use_dora=dora)
    model(**batch()).loss.backward()
    together = grads(model)
    assert at_rest(model)
    model.zero_grad()
    lonely(model)(**batch()).loss.backward()
    assert gap((g, together[n]) for n, g in grads(model).items()) < 1e-6 and len(together) == len(model.ftbook_added)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name, dora", [("Llama", False), ("T5", False), ("BERT", False), ("Llama", True)])
def test_gradient_checkpointing(name, dora, reentrant):
    model = lively(make(name), use_dora=dora)
    model(**batch()).loss.backward()
    want = grads(model)
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(**batch()).loss.backward()
    assert (
        gap((g, want[n]) for n, g in grads(model).items()) < 1e-6 and len(want) == len(grads(model)) and at_rest(model)
    )


def test_checkpointing_each_layer_by_itself():
    from torch.utils.checkpoint import checkpoint

    model = lively(make("Llama"))
    model(**batch()).loss.backward()
    want = grads(model)
    model.zero_grad()
    for o in parts_of(model).values():
        o.forward = (lambda f: lambda x: checkpoint(f, x, use_reentrant=False))(o.forward)
    model(**batch()).loss.backward()
    assert gap((g, want[n]) for n, g in grads(model).items()) < 1e-6 and at_rest(model)


def test_two_forwards_before_a_backward():
    model = lively(make("Llama"))
    one, two = model(**batch(1)).loss, model(**batch(2)).loss
    one.backward()
    two.backward()
    want = lonely(copy.deepcopy(model))
    want.zero_grad()
    (want(**batch(1)).loss + want(**batch(2)).loss).backward()
    assert gap((g, grads(model)[n]) for n, g in grads(want).items()) < 1e-6


def test_generation_and_modes():
    model = lively(make("Llama")).eval()
    ids = batch()["input_ids"]
    want = lonely(copy.deepcopy(model))
    say = lambda m: m.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    assert torch.equal(say(model), say(want)) and at_rest(model)
    logits = want(ids).logits
    with torch.no_grad():
        assert gap([(model(ids).logits, logits)]) < 1e-6
    with torch.inference_mode():
        assert float((model(ids).logits - logits).abs().max()) < 1e-6
    assert gap([(model(ids).logits, logits)]) < 1e-6 and at_rest(model)


class Three(nn.Module):
    def __init__(self, n=16, dropout=0.0, kind=nn.Linear, bias=False):
        super().__init__()
        torch.manual_seed(0)
        for k, out in zip(("q_proj", "k_proj", "v_proj"), (n, n // 2, n // 2)):
            layer = LoRALinear(kind(n, out, bias=bias).requires_grad_(False), 4, 2.0, dropout)
            nn.init.normal_(layer.lora_B, std=0.1)
            setattr(self, k, layer)

    def forward(self, x, order=("q_proj", "k_proj", "v_proj")):
        return [getattr(self, k)(x) for k in order]


def three(**kw):
    m = Three(**kw)
    share_siblings_(nn.ModuleDict({"attn": m}))
    return m, m.q_proj.siblings


def test_a_follower_that_is_never_called():
    m, family = three()
    x = torch.randn(3, 16, requires_grad=True)
    q, v = m(x, ("q_proj", "v_proj"))
    assert not family.waiting and family.x is None
    (q.sum() + v.sum()).backward()
    assert m.k_proj.lora_A.grad is None and m.q_proj.lora_A.grad is not None
    want = x.grad.clone()
    x.grad = None
    family.part_()
    sum(o.sum() for o in m(x, ("q_proj", "v_proj"))).backward()
    assert (x.grad - want).abs().max() < 1e-5


def test_any_order_and_twice():
    m, family = three()
    x = torch.randn(3, 16, requires_grad=True)
    order = ("v_proj", "q_proj", "v_proj", "k_proj", "k_proj")
    got = m(x, order)
    assert all((a - getattr(m, k).plain(x)).abs().max() < 1e-5 for a, k in zip(got, order)) and not family.waiting


def test_an_error_inside_the_parent():
    m, family = three()
    with pytest.raises(AttributeError):
        m(torch.randn(3, 16), ("q_proj", "nobody"))
    assert not family.waiting and family.x is None


def test_changed_in_place_between_siblings():
    m, family = three()
    x = torch.randn(3, 16)
    m.q_proj(x)
    x.mul_(2)
    assert (m.k_proj(x) - m.k_proj.plain(x)).abs().max() < 1e-5


def test_a_backward_between_siblings():
    m, family = three()
    x = torch.randn(3, 16, requires_grad=True)
    m.q_proj(x).sum().backward()
    assert not family.waiting
    m.k_proj(x).sum().backward()  # the graph of q is gone; k has its own


def test_another_grad_mode_between_siblings():
    m, family = three()
    x = torch.randn(3, 16, requires_grad=True)
    with torch.no_grad():
        q = m.q_proj(x)
    k = m.k_proj(x)
    with torch.no_grad():
        v = m.v_proj(x)
    assert not q.requires_grad and k.requires_grad and not v.requires_grad


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 16), (2, 2, 3, 16)])
def test_outputs_may_be_changed_in_place(shape, bias):
    m, _ = three(bias=bias)
    x = torch.randn(shape, requires_grad=True)
    (want,) = torch.autograd.grad(
        sum((f(o.plain(x))).sum() for f, o in zip((lambda y: y * 2, lambda y: y + 1, torch.relu), m.children())), x
    )
    q, k, v = m(x)
    q.mul_(2.0)
    k.add_(1.0)
    v.relu_()
    (q.sum() + k.sum() + v.sum()).backward()
    assert (x.grad - want).abs().max() < 1e-5


def test_hooks_see_each_layer():
    m, family = three()
    x, seen = torch.randn(3, 16), []
    m.k_proj.register_forward_hook(lambda mod, a, y: seen.append(y.shape))
    m.v_proj.register_forward_pre_hook(lambda mod, a: (a[0] + 1,))
    q, k, v = m(x)
    assert seen == [(3, 8)] and (v - m.v_proj.plain(x + 1)).abs().max() < 1e-5


def test_dropout_gives_each_its_own_mask_and_no_family():
    m, family = three(dropout=0.5)
    x = torch.randn(3, 16)
    m.q_proj(x)
    assert not family.waiting
    a, b = m(x), m(x)
    assert not torch.equal(a[0], b[0])
    m.eval()
    m.q_proj(x)
    assert len(family.waiting) == 2
    family.clear()


def test_one_member_that_cannot():
    m, family = three()
    x = torch.randn(3, 16)
    m.v_proj.base.weight.requires_grad_(True)  # somebody trains it: its gradient must not be lost
    q, k, v = m(x)
    (q.sum() + v.sum()).backward()
    assert m.v_proj.base.weight.grad is not None and m.q_proj.lora_B.grad is not None


class Quantised(nn.Linear):
    "Stands for a layer that keeps its weight in another form."

    def forward(self, x):
        return super().forward(x).round(decimals=1)


def test_a_base_of_another_kind_is_called():
    m, family = three(kind=Quantised)
    x = torch.randn(3, 16, requires_grad=True)
    q, k, v = m(x)
    low = lambda o: (x @ o.lora_A.t() @ o.lora_B.t()) * o.scaling
    assert (q - (m.q_proj.base(x) + low(m.q_proj))).abs().max() < 1e-6 and not family.waiting


@pytest.mark.parametrize("shape", [(16,), (1, 16), (0, 16), (2, 3, 16), (2, 1, 3, 16)])
def test_shapes(shape):
    m, _ = three(bias=True)
    x = torch.randn(shape, requires_grad=True)
    for y, o in zip(m(x), m.children()):
        assert y.shape == (*shape[:-1], len(o.lora_B)) and torch.allclose(y, o.plain(x), atol=1e-5)
    m(x)[0].sum().backward()
    assert x.grad.shape == shape


def test_strided_input():
    m, _ = three()
    x = torch.randn(16, 5, requires_grad=True)
    q, k, v = m(x.t())
    (q.sum() + k.square().sum()).backward()
    want, x.grad = x.grad, None
    (m.q_proj.plain(x.t()).sum() + m.k_proj.plain(x.t()).square().sum()).backward()
    assert (want - x.grad).abs().max() < 1e-4


def test_one_frozen_matrix():
    m, _ = three()
    m.q_proj.lora_A.requires_grad_(False)
    sum(y.sum() for y in m(torch.randn(3, 16))).backward()
    assert m.q_proj.lora_A.grad is None and m.q_proj.lora_B.grad is not None


def test_unequal_ranks_and_scalings():
    layers = []
    for rank, scaling in ((2, 1.0), (5, 0.5), (3, 4.0)):
        o = LoRALinear(nn.Linear(16, 12).requires_grad_(False), rank, scaling)
        nn.init.normal_(o.lora_B, std=0.1)
        layers.append(o)
    x, found = torch.randn(7, 16, requires_grad=True), []
    for ys in (low_rank(x, layers), [o.plain(x) for o in layers]):
        found.append(
            torch.autograd.grad(
                sum(y.square().sum() for y in ys), [x] + [p for o in layers for p in (o.lora_A, o.lora_B)]
            )
        )
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*found))


def test_copies_are_families_of_their_own(tmp_path):
    model = lively(make("Llama"))
    for other in (copy.deepcopy(model),):
        q, k = (getattr(other.model.layers[0].self_attn, n) for n in ("q_proj", "k_proj"))
        assert (
            q.siblings is k.siblings
            and q.siblings.layers[1] is k
            and q.siblings is not model.model.layers[0].self_attn.q_proj.siblings
        )
        other(**batch()).loss.backward()
        assert at_rest(other) and not grads(model)
        other.ftbook_method
    torch.save(model.state_dict(), tmp_path / "s.pt")
    model.load_state_dict(torch.load(tmp_path / "s.pt", weights_only=True))


def test_members_that_were_replaced():
    m, family = three()
    m.k_proj = nn.Linear(16, 8)
    x = torch.randn(3, 16)
    q, k, v = m(x)
    assert (k - m.k_proj(x)).abs().max() == 0 and not family.waiting
