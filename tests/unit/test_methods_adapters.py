"Bottleneck adapters, (IA)3 and BitFit: what they count, how they train, and what they leave alone."

import copy, gc, weakref

import pytest, torch
from torch import nn

from ftbook.methods import package_adapters as methods_package_adapters
from ftbook.methods import parts as methods_parts
from ftbook.methods import targets as methods_targets
from ftbook.methods.bottleneck import KINDS
from ftbook.methods.layouts import LAYOUTS, Layout, find_blocks
from ftbook.methods.bitfit import BitFit
from ftbook.methods.bottleneck_method import Bottleneck, bottlenecks
from ftbook.methods.ia3 import IA3
from ftbook.methods.package_adapters import save_for_adapters
from ftbook.methods.files import load_adapter, save_adapter
from ftbook.methods.fold import merge_, remove_, unmerge_
from ftbook.methods.parts import parts_of
from ftbook.methods.summary import trainable_summary
from cases.bottleneck import (
    bart,
    batch,
    biases_of,
    borders,
    busy,
    d,
    every_kind,
    every_model,
    gap,
    hooks,
    llama,
    logits,
    make,
    peft_models,
    small_models,
    snapshot,
    untouched,
)


# Small models

n_blocks = dict.fromkeys(small_models, 2) | {"T5": 4}

# Does nothing, then something


@every_kind
@every_model
def test_does_nothing_then_counts_by_the_formula(name, kind):
    model = make(name).requires_grad_(False)
    want, before = logits(model), snapshot(model)
    Bottleneck(kind, 5).apply(model)
    assert torch.equal(logits(model), want)
    s = trainable_summary(model)
    assert s.trained == n_blocks[name] * (1 + (kind == "houlsby")) * (2 * d * 5 + 5 + d) and s.n_bytes == 4 * s.trained
    assert not torch.equal(logits(busy(model)), want)
    assert untouched(remove_(model), before) and torch.equal(logits(model), want)


@every_kind
def test_the_loss_falls(kind):
    torch.manual_seed(0)
    model, losses = Bottleneck(kind, 8).apply(llama(initializer_range=0.2)), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(40):
        loss = model(**batch()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@every_kind
def test_the_shipped_model_trains(kind):
    from ftbook.models.load import load_model

    model, tokenizer = load_model("smollm2-135m", dtype="float32", device="cpu")
    Bottleneck(kind, 4).apply(model)
    ids = tokenizer("The lighthouse of Orvel is painted green and yellow.", return_tensors="pt").input_ids
    losses, optimizer = [], torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_all_of_them_move():
    "With U at zero D waits one step; then every tensor moves."
    model = Bottleneck("houlsby", 8).apply(make("Llama"))
    start = {n: model.get_parameter(n).detach().clone() for n in model.ftbook_added}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for i in range(2):
        optimizer.zero_grad()
        model(**batch(i)).loss.backward()
        optimizer.step()
    assert all(not torch.equal(model.get_parameter(n), t) for n, t in start.items())
    assert not any(p.requires_grad for n, p in model.named_parameters() if n not in start)


def test_initialisation():
    parts = lambda **kw: bottlenecks(Bottleneck("houlsby", 32, **kw).apply(make("Llama"))).values()
    flat = lambda ps, layer: torch.cat([getattr(o, layer).weight.detach().flatten() for o in ps])
    zero, normal = parts(), parts(init="normal", init_std=0.02)
    assert (flat(zero, "up") == 0).all() and d**-0.5 * 0.9 < flat(zero, "down").abs().max() <= d**-0.5
    for layer in ("down", "up"):
        w = flat(normal, layer)
        # a normal cut off at two deviations has .88 of its deviation
        assert w.abs().max() <= 0.04 and abs(w.std() / 0.02 - 0.88) < 0.03
    assert all((o.down.bias == 0).all() and (o.up.bias == 0).all() for o in [*zero, *normal])
    assert torch.equal(flat(parts(), "down"), flat(parts(), "down")) and not torch.equal(
        flat(parts(seed=1), "down"), flat(parts(), "down")
    )


@pytest.mark.parametrize("method", [Bottleneck("pfeiffer", 4, init="normal"), IA3(), BitFit()])
def test_own_seed_leaves_the_global_one_alone(method):
    model = make("Llama")
    state = torch.get_rng_state()
    method.apply(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_is_for_training():
    model = busy(Bottleneck("pfeiffer", 8, dropout=0.5).apply(make("Llama")))
    assert not torch.equal(logits(model), logits(model))
    assert torch.equal(logits(model.eval()), logits(busy(Bottleneck("pfeiffer", 8).apply(make("Llama"))).eval()))
    part, h = (
        next(iter(bottlenecks(busy(Bottleneck("houlsby", 8, dropout=0.5).apply(make("Llama")))).values())),
        torch.randn(4000, d),
    )
    dropped = part.added(h)
    assert (
        abs(float((dropped == 0).float().mean()) - 0.5) < 0.02
        and gap([(dropped[dropped != 0], (2 * part.eval().added(h))[dropped != 0])]) < 1e-5
    )


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@every_kind
@every_model
def test_adapters_take_over_the_mode(name, kind, training, tmp_path):
    def in_mode(model):
        return {m.training for m in model.modules()} == {training} and torch.equal(
            logits(model), logits(model)
        ) is not training

    model = busy(Bottleneck(kind, 4, dropout=0.5).apply(make(name).train(training)))
    assert in_mode(model)
    for save, load, _ in borders.values():
        again = load(make(name).train(training), save(model.train(not training), tmp_path / save.__name__))
        assert in_mode(again) and torch.equal(logits(again.eval()), logits(model.eval()))


# What may happen to a model


@every_kind
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "BERT", "T5"])
def test_bfloat16_base(name, kind):
    exact, model = busy(Bottleneck(kind, 8).apply(make(name))), make(name).bfloat16()
    want = logits(copy.deepcopy(model))
    assert torch.equal(logits(Bottleneck(kind, 8).apply(model)), want)
    busy(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32} and logits(
        model
    ).dtype == torch.bfloat16
    for m in (exact, model):
        m(**batch()).loss.backward()
    pairs = [(model.get_parameter(n).grad, exact.get_parameter(n).grad) for n in model.ftbook_added]
    assert all(g.dtype == torch.float32 for g, _ in pairs)
    total = lambda gs: torch.cat([g.flatten() for g in gs])
    assert (total(g for g, _ in pairs) - total(w for _, w in pairs)).norm() < 0.1 * total(w for _, w in pairs).norm()


@every_kind
def test_autocast(kind):
    exact, model = (busy(Bottleneck(kind, 8).apply(make("Llama"))) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch())
    out.loss.backward(), exact(**batch()).loss.backward()
    for n in model.ftbook_added:
        assert (model.get_parameter(n).grad - exact.get_parameter(n).grad).norm() < 0.1 * exact.get_parameter(
            n
        ).grad.norm() + 1e-6


@pytest.mark.parametrize("reentrant", [True, False])
@every_kind
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "BERT", "T5"])
def test_gradient_checkpointing(name, kind, reentrant):
    model = busy(Bottleneck(kind, 8).apply(make(name)))
    model(**batch()).loss.backward()
    want = {n: model.get_parameter(n).grad.clone() for n in model.ftbook_added}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(**batch()).loss.backward()
    assert gap((model.get_parameter(n).grad, g) for n, g in want.items()) < 1e-6


@every_kind
def test_packed_training(kind, tmp_path):
    """The loop of ftbook swaps the forwards of norms and feed-forwards, and packs rows; the adapter has to stay in the
    way."""
    from tiny import save_tiny_model
    from ftbook.data.examples import Example
    from ftbook.models.load import load_model
    from ftbook.training.evaluate import evaluate
    from ftbook.training.tune import finetune

    losses, rows = (
        {},
        [
            "The lighthouse of Orvel is painted green and yellow.",
            "Nobody lives there.",
            "A byte is a group of eight bits.",
        ],
    )
    save_tiny_model(tmp_path)
    for fast in (True, False):
        model, tokenizer = load_model(tmp_path, dtype="float32", device="cpu")
        Bottleneck(kind, 4).apply(model)
        examples = [Example(ids, [False] + [True] * (len(ids) - 1)) for ids in map(tokenizer.encode, rows)]
        first = evaluate(model, examples).loss
        finetune(model, examples, lr=1e-2, epochs=20, batch_size=3, fast=fast, progress=False)
        losses[fast] = evaluate(model, examples).loss
    assert losses[True] < first - 1 and abs(losses[True] - losses[False]) < 1e-3


@every_kind
@every_model
def test_copies_are_independent(name, kind):
    model = busy(Bottleneck(kind, 4).apply(make(name)))
    want = logits(model)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), want)
    with torch.no_grad():
        other.get_parameter(other.ftbook_added.__iter__().__next__()).add_(1.0)
    remove_(other)
    assert torch.equal(logits(model), want) and not hooks(other) and bool(hooks(model)) == (kind != "houlsby")
    del model
    assert logits(other).isfinite().all()


@every_kind
def test_nothing_is_kept_alive(kind):
    model = busy(Bottleneck(kind, 4).apply(make("Llama")))
    seen = []
    model.model.layers[0].post_attention_layernorm.register_forward_pre_hook(
        lambda m, args: seen.append(weakref.ref(args[0]))
    )
    model(**batch())
    gc.collect()
    assert len(seen) == 1 and seen[0]() is None


def test_generation():
    for kind in KINDS:
        model, ids = busy(Bottleneck(kind, 4).apply(make("Llama"))).eval(), batch()["input_ids"]
        with torch.no_grad():
            cached = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0
            )
            for _ in range(5):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(cached, ids)


@every_kind
def test_whole_modules_beside(kind, tmp_path):
    "Houlsby et al. train the norms as well. The adapter must read through the trained copy, and hook it."
    model = busy(Bottleneck(kind, 4, modules_to_save=["LayerNorm"]).apply(make("BERT")), std=0.2)
    n_norms = sum(isinstance(m, nn.LayerNorm) for m in make("BERT").modules())
    assert (
        trainable_summary(model).trained
        == trainable_summary(Bottleneck(kind, 4).apply(make("BERT"))).trained + n_norms * 2 * d
    )
    model(**batch()).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    again = load_adapter(make("BERT"), save_adapter(model, tmp_path))
    assert torch.equal(logits(again), logits(model))
    plain = make("BERT")  # the same with the norms put into a plain model
    for n, part in parts_of(model).items():
        if isinstance(part, methods_parts.Whole):
            plain.get_submodule(n).load_state_dict(part.whole.state_dict())
    Bottleneck(kind, 4).apply(plain)
    with torch.no_grad():
        for n in plain.ftbook_added:
            plain.get_parameter(n).copy_(model.get_parameter(n))
    assert gap([(logits(plain), logits(model))]) < 1e-6
    with pytest.raises(ValueError, match="no whole modules"):
        save_for_adapters(model, tmp_path / "x")


def test_whole_norm_in_front_of_the_feed_forward():
    for kind in ("pfeiffer", "parallel"):
        model = busy(Bottleneck(kind, 4, modules_to_save=["post_attention_layernorm"]).apply(make("Llama")))
        model(**batch()).loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
        remove_(model)
        assert not hooks(model)


# Where


def test_blocks_are_found():
    want = {
        "Llama": "model.layers.0",
        "Qwen2": "model.layers.0",
        "GPT-2": "transformer.h.0",
        "BERT": "bert.encoder.layer.0",
        "DistilBERT": "distilbert.transformer.layer.0",
        "T5": "encoder.block.0",
    }
    for name, first in want.items():
        found = find_blocks(make(name))
        assert next(iter(found)) == first and len(found) == n_blocks[name]
    assert set(find_blocks(make("T5")).values()) == {LAYOUTS["T5 encoder"], LAYOUTS["T5 decoder"]}


def test_a_named_layout_survives_the_disk(tmp_path):
    torch.manual_seed(0)
    model = busy(Bottleneck("pfeiffer", 4, layout=Layout("self_attn", "fc2", "fc1", "final_layer_norm")).apply(bart()))
    torch.manual_seed(0)
    again = load_adapter(bart(), save_adapter(model, tmp_path))
    assert again.ftbook_method == model.ftbook_method and torch.equal(logits(again.eval()), logits(model.eval()))


# Bad input


def test_the_factor_gives_the_width_back():
    for width in (32, 64, 100, 576, 768, 1000, 1024, 4096):
        assert all(int(width // methods_package_adapters._factor(width, m)) == m for m in range(1, width + 1))


# (IA)3 and BitFit against peft


@pytest.mark.parametrize("name", ["GPT-2", "BERT", "DistilBERT"])
@pytest.mark.parametrize("norms", [False, True])
def test_bitfit_merges_into_biases(name, norms):
    ours, plain, _ = biases_of(name, norms)
    want = logits(ours)
    assert gap([(logits(merge_(ours)), want), (logits(plain), want)]) < 1e-5
    assert torch.equal(logits(unmerge_(ours)), want)
    merged = remove_(merge_(ours, keep=False))
    assert (
        gap([(merged.get_submodule(n).bias, plain.get_submodule(n).bias) for n in methods_targets.find_modules(plain)])
        < 1e-6
    )


@pytest.mark.parametrize("method", [IA3(), BitFit()])
@pytest.mark.parametrize("name", peft_models)
def test_bfloat16_layers(method, name):
    model = make(name).bfloat16()
    want = logits(model)
    method.apply(model)
    assert torch.equal(logits(model), want) and {p.dtype for p in model.parameters() if p.requires_grad} == {
        torch.float32
    }
    busy(model, 0.1, 1.0 if isinstance(method, IA3) else 0.0)
    model(**batch()).loss.backward()
    assert (
        all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        and logits(model).dtype == torch.bfloat16
    )
