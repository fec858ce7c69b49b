"Bottleneck adapters, (IA)3 and BitFit: against plain torch, against peft, against the `adapters` package, and against bad input."

import contextlib, copy, gc, itertools, json, math, os, re, sys, weakref

import pytest, torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from book import nbs
from ftbook.methods import bottleneck as methods_bottleneck
from ftbook.methods import files as methods_files
from ftbook.methods import package_adapters as methods_package_adapters
from ftbook.methods import parts as methods_parts
from ftbook.methods import targets as methods_targets
from ftbook.methods.bottleneck import ACTIVATIONS, KINDS
from ftbook.methods.layouts import LAYOUTS, Layout, find_blocks
from ftbook.methods.bitfit import BitFit
from ftbook.methods.bottleneck_method import Bottleneck, bottlenecks
from ftbook.methods.ia3 import IA3
from ftbook.methods.package_adapters import load_from_adapters, save_for_adapters
from ftbook.methods.files import load_adapter, save_adapter
from ftbook.methods.fold import merge_, remove_, unmerge_
from ftbook.methods.parts import parts_of
from ftbook.methods.summary import trainable_summary

vocab, d, heads = 60, 32, 4


# Small models


def llama(**kw):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=d,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=2,
            vocab_size=vocab,
            **kw,
        )
    )


def qwen():
    from transformers import Qwen2Config, Qwen2ForCausalLM  # biases on q, k and v, none elsewhere

    return Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=d,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=2,
            vocab_size=vocab,
        )
    )


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel  # Conv1D

    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=d,
            n_layer=2,
            n_head=heads,
            vocab_size=vocab,
            n_positions=64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def bert():
    from transformers import BertConfig, BertForMaskedLM  # post-LN

    return BertForMaskedLM(
        BertConfig(
            hidden_size=d,
            num_hidden_layers=2,
            num_attention_heads=heads,
            intermediate_size=64,
            vocab_size=vocab,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def distilbert():
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    return DistilBertForMaskedLM(
        DistilBertConfig(
            dim=d, n_layers=2, n_heads=heads, hidden_dim=64, vocab_size=vocab, dropout=0.0, attention_dropout=0.0
        )
    )


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            d_model=d,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=heads,
            vocab_size=vocab,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
            tie_word_embeddings=False,
            initializer_factor=0.3,
        )
    )


def bart():
    from transformers import BartConfig, BartForConditionalGeneration  # not in LAYOUTS

    return BartForConditionalGeneration(
        BartConfig(
            d_model=d,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            vocab_size=vocab,
            max_position_embeddings=64,
            dropout=0.0,
            attention_dropout=0.0,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=1,
            forced_eos_token_id=1,
        )
    )


small_models = {"Llama": llama, "Qwen2": qwen, "GPT-2": gpt2, "BERT": bert, "DistilBERT": distilbert, "T5": t5}
n_blocks = dict.fromkeys(small_models, 2) | {"T5": 4}
every_model, every_kind = pytest.mark.parametrize("name", small_models), pytest.mark.parametrize("kind", KINDS)


def make(name, seed=0):
    torch.manual_seed(seed)
    return small_models[name]().train()


def batch(seed=1, n=2, length=8):
    ids = torch.randint(2, vocab, (n, length), generator=torch.Generator().manual_seed(seed))
    return dict(input_ids=ids, labels=ids)


def busy(model, std=0.1, mean=0.0, seed=1):
    "Give every new parameter a random value."
    torch.manual_seed(seed)
    for n in model.ftbook_added:
        nn.init.normal_(model.get_parameter(n), mean, std)
    return model


def logits(model, seed=1):
    with torch.no_grad():
        return model(**batch(seed)).logits


def gap(pairs):
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


def snapshot(model):
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [type(m) for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
    )


def untouched(model, before):
    state, kinds, grads = snapshot(model)
    return (
        all(torch.equal(v, before[0][k]) for k, v in state.items())
        and (kinds, grads) == before[1:]
        and not hasattr(model, "ftbook_method")
        and not hooks(model)
    )


def hooks(model):
    return [n for n, m in model.named_modules() if m._forward_pre_hooks or m._forward_hooks]


# The papers' equations in plain torch: every block written out, with the adapter in it. `p` holds the model's tensors, `a` the adapters'.


def linear(p, name, x, transposed=False):
    w = p[f"{name}.weight"]
    return x @ (w if transposed else w.t()) + (p[f"{name}.bias"] if f"{name}.bias" in p else 0)


def layer_norm(p, name, x, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def rms_norm(p, name, x, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * p[f"{name}.weight"]


def attend(q, k, v, n_heads, scale, bias=0.0):
    "q, k, v: (B, T, heads*d); keys and values may have fewer heads. `bias` is added to the scores."
    split = lambda x: x.unflatten(-1, (-1, q.shape[-1] // n_heads)).transpose(1, 2)
    q, k, v = split(q), split(k), split(v)
    k, v = (x.repeat_interleave(n_heads // x.shape[1], 1) for x in (k, v))
    return ((q @ k.transpose(-1, -2) * scale + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)


def causal(n):
    return torch.full((n, n), -math.inf).triu(1)


class Adapters:
    "The three papers' adapters, by block: {block: {'attention': (D, b, U, c), 'feed_forward': ...}}."

    def __init__(self, kind, tensors, s, act):
        self.kind, self.tensors, self.s, self.act = kind, tensors, s, act

    def f(self, block, where, x):
        D, b, U, c = self.tensors[block][where]
        return self.s * (self.act(x @ D.t() + b) @ U.t() + c)

    def after_attention(self, block, h):
        return h + self.f(block, "attention", h) if self.kind == "houlsby" else h

    def pre_ln(self, block, x, h):
        "x: the stream, h: what the feed-forward adds to it."
        if self.kind == "houlsby":
            return x + (h + self.f(block, "feed_forward", h))
        if self.kind == "pfeiffer":
            return (x + h) + self.f(block, "feed_forward", x + h)
        return x + h + self.f(block, "feed_forward", x)

    def post_ln(self, block, x, h, norm):
        "The same where a norm follows the addition."
        if self.kind == "houlsby":
            return norm(x + h + self.f(block, "feed_forward", h))
        if self.kind == "pfeiffer":
            return norm(x + h + self.f(block, "feed_forward", norm(x + h)))
        return norm(x + h + self.f(block, "feed_forward", x))


def llama_by_hand(p, ids, a):
    x, eps = p["model.embed_tokens.weight"][ids], 1e-6
    # heads of 8
    angle = torch.outer(torch.arange(ids.shape[1]).float(), 10000.0 ** (-torch.arange(0, 8, 2) / 8)).repeat(1, 2)

    def rotate(y, n):
        y = y.unflatten(-1, (n, 8)).transpose(1, 2)
        return (y * angle.cos() + torch.cat([-y[..., 4:], y[..., :4]], -1) * angle.sin()).transpose(1, 2).flatten(2)

    for i in range(2):
        b = f"model.layers.{i}"
        y = rms_norm(p, f"{b}.input_layernorm", x, eps)
        q, k, v = (linear(p, f"{b}.self_attn.{o}_proj", y) for o in "qkv")
        h = linear(
            p, f"{b}.self_attn.o_proj", attend(rotate(q, heads), rotate(k, 2), v, heads, 8**-0.5, causal(ids.shape[1]))
        )
        x = x + a.after_attention(b, h)
        y = rms_norm(p, f"{b}.post_attention_layernorm", x, eps)
        x = a.pre_ln(
            b,
            x,
            linear(
                p, f"{b}.mlp.down_proj", F.silu(linear(p, f"{b}.mlp.gate_proj", y)) * linear(p, f"{b}.mlp.up_proj", y)
            ),
        )
    return linear(p, "lm_head", rms_norm(p, "model.norm", x, eps))


def gpt2_by_hand(p, ids, a):
    x, eps = p["transformer.wte.weight"][ids] + p["transformer.wpe.weight"][: ids.shape[1]], 1e-5
    for i in range(2):
        b = f"transformer.h.{i}"
        q, k, v = linear(p, f"{b}.attn.c_attn", layer_norm(p, f"{b}.ln_1", x, eps), True).split(d, -1)
        h = linear(p, f"{b}.attn.c_proj", attend(q, k, v, heads, 8**-0.5, causal(ids.shape[1])), True)
        x = x + a.after_attention(b, h)
        y = linear(p, f"{b}.mlp.c_fc", layer_norm(p, f"{b}.ln_2", x, eps), True)
        x = a.pre_ln(b, x, linear(p, f"{b}.mlp.c_proj", F.gelu(y, approximate="tanh"), True))
    return layer_norm(p, "transformer.ln_f", x, eps) @ p["transformer.wte.weight"].t()


def bert_by_hand(p, ids, a):
    e, eps = "bert.embeddings", 1e-12
    x = (
        p[f"{e}.word_embeddings.weight"][ids]
        + p[f"{e}.position_embeddings.weight"][: ids.shape[1]]
        + p[f"{e}.token_type_embeddings.weight"][0]
    )
    x = layer_norm(p, f"{e}.LayerNorm", x, eps)
    for i in range(2):
        b = f"bert.encoder.layer.{i}"
        q, k, v = (linear(p, f"{b}.attention.self.{o}", x) for o in ("query", "key", "value"))
        h = linear(p, f"{b}.attention.output.dense", attend(q, k, v, heads, 8**-0.5))
        x = layer_norm(p, f"{b}.attention.output.LayerNorm", x + a.after_attention(b, h), eps)
        h = linear(p, f"{b}.output.dense", F.gelu(linear(p, f"{b}.intermediate.dense", x)))
        x = a.post_ln(b, x, h, lambda z: layer_norm(p, f"{b}.output.LayerNorm", z, eps))
    h = "cls.predictions"
    x = layer_norm(p, f"{h}.transform.LayerNorm", F.gelu(linear(p, f"{h}.transform.dense", x)), eps)
    return x @ p[f"{e}.word_embeddings.weight"].t() + p[f"{h}.bias"]


def t5_by_hand(p, ids, a):
    eps, n = 1e-6, ids.shape[1]
    # key minus query; up to 8 away every distance has a bucket of its own
    far = torch.arange(n)[None] - torch.arange(n)[:, None]

    def stack(side, x, bias, memory=None):
        for i in range(2):
            b = f"{side}.block.{i}"

            def attention(layer, name, y, of, bias):
                q, k, v = (
                    linear(p, f"{layer}.{name}.q", y),
                    linear(p, f"{layer}.{name}.k", of),
                    linear(p, f"{layer}.{name}.v", of),
                )
                return linear(p, f"{layer}.{name}.o", attend(q, k, v, heads, 1.0, bias))

            y = rms_norm(p, f"{b}.layer.0.layer_norm", x, eps)
            x = x + a.after_attention(b, attention(f"{b}.layer.0", "SelfAttention", y, y, bias))
            if memory is not None:
                x = x + attention(
                    f"{b}.layer.1", "EncDecAttention", rms_norm(p, f"{b}.layer.1.layer_norm", x, eps), memory, 0.0
                )
            last = f"{b}.layer.{1 if memory is None else 2}"
            y, m = rms_norm(p, f"{last}.layer_norm", x, eps), f"{last}.DenseReluDense"
            x = a.pre_ln(
                b,
                x,
                linear(p, f"{m}.wo", F.gelu(linear(p, f"{m}.wi_0", y), approximate="tanh") * linear(p, f"{m}.wi_1", y)),
            )
        return rms_norm(p, f"{side}.final_layer_norm", x, eps)

    table = lambda side: p[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    embed = p["shared.weight"]
    memory = stack("encoder", embed[ids], table("encoder")[far.abs() + 16 * (far > 0)].permute(2, 0, 1))
    before = torch.cat([torch.zeros(len(ids), 1, dtype=ids.dtype), ids[:, :-1]], 1)
    out = stack("decoder", embed[before], table("decoder")[(-far).clamp(min=0)].permute(2, 0, 1) + causal(n), memory)
    return linear(p, "lm_head", out)


by_hand = {"Llama": llama_by_hand, "GPT-2": gpt2_by_hand, "BERT": bert_by_hand, "T5": t5_by_hand}
shifts = {"Llama": 1, "GPT-2": 1, "BERT": 0, "T5": 0}  # causal models predict the next token
activations = dict(houlsby="silu", pfeiffer="relu", parallel="gelu")
by_torch = dict(relu=torch.relu, gelu=F.gelu, silu=lambda x: x * torch.sigmoid(x))


def loss_by_hand(name, out, ids):
    s = shifts[name]
    return F.cross_entropy(out[:, : out.shape[1] - s].flatten(0, 1), ids[:, s:].flatten())


def ours_by_block(model):
    "The adapters' tensors by block and place, in the order D, b, U, c."
    found = {}
    for n, part in bottlenecks(model).items():
        where = (
            "attention"
            if n == f"{part.place.block}.{part.place.layout.attention}" and model.ftbook_method.kind == "houlsby"
            else "feed_forward"
        )
        found.setdefault(part.place.block, {})[where] = [part.down.weight, part.down.bias, part.up.weight, part.up.bias]
    return found


def against_plain_torch(name, kind, steps=10):
    "Largest differences of logits, gradients, and weights after ten steps of AdamW."
    base = make(name)
    p = {k: t.detach().clone() for k, t in base.state_dict().items()}
    model = busy(Bottleneck(kind, 5, activations[kind]).apply(base))
    tensors = {
        b: {w: [t.detach().clone().requires_grad_() for t in ts] for w, ts in places.items()}
        for b, places in ours_by_block(model).items()
    }
    pairs = [
        (o, t)
        for b, places in ours_by_block(model).items()
        for w, ts in places.items()
        for o, t in zip(ts, tensors[b][w])
    ]
    assert len(pairs) == len(model.ftbook_added)
    theirs = Adapters(kind, tensors, 4.0 if kind == "parallel" else 1.0, by_torch[activations[kind]])
    optimizers, found = [torch.optim.AdamW([q[i] for q in pairs], lr=1e-3) for i in (0, 1)], {}
    for step in range(steps):
        data = batch(step)
        ours, want = model(**data), by_hand[name](p, data["input_ids"], theirs)
        losses = ours.loss, loss_by_hand(name, want, data["labels"])
        for loss, o in zip(losses, optimizers):
            o.zero_grad()
            loss.backward()
        if step == 0:
            found.update(logits=gap([(ours.logits, want)]), gradients=gap((q.grad, t.grad) for q, t in pairs))
            assert all(float(q.grad.abs().max()) > 1e-7 for q, _ in pairs), "a comparison of zeros proves nothing"
        for o in optimizers:
            o.step()
    return found | dict(weights=gap(pairs))


def plain_torch_rows():
    "(what, largest differences) of bottlenecks against the equations in plain torch."
    return [(f"{name}: {kind}", against_plain_torch(name, kind)) for name in by_hand for kind in KINDS]


@pytest.mark.parametrize("name", by_hand)
def test_the_oracle_tells_the_kinds_apart(name):
    base = make(name)
    p, data = {k: t.detach().clone() for k, t in base.state_dict().items()}, batch()
    model = busy(Bottleneck("pfeiffer", 5, "relu").apply(base), std=0.5)
    out = {
        kind: by_hand[name](
            p,
            data["input_ids"],
            Adapters(
                kind,
                {b: {"attention": o["feed_forward"], **o} for b, o in ours_by_block(model).items()},
                1.0,
                torch.relu,
            ),
        )
        for kind in KINDS
    }
    assert gap([(out["pfeiffer"], model(**data).logits)]) < 1e-5
    assert all(gap([(out["pfeiffer"], out[kind])]) > 1e-3 for kind in ("houlsby", "parallel"))


# The `adapters` package

sys.path.insert(0, str(nbs / "bench"))
import adapters_worker as worker  # noqa: E402


def check_runs(runs):
    assert [(r["architecture"], r["kind"]) for r in runs] == [
        (a, k) for a in worker.ARCHITECTURES for k in worker.KINDS
    ]
    for r in runs:
        assert all(
            r[k] <= 1e-5 for k in ("base", "logits", "gradients", "weights", "after", "theirs_read", "native_read")
        ), r
        assert r["effect"] > 0.01 and r["smallest_gradient"] > 1e-7 and not r["lost"] and r["tensors"] >= 8
    assert {r["architecture"] for r in runs if r["head"]} == set(worker.ARCHITECTURES) - set(worker.TIED_HEAD)


def test_recorded_parity_with_the_package():
    results = worker.read()
    check_runs(results["runs"])
    assert results["versions"]["package"]["adapters"] == methods_package_adapters.PACKAGE.removeprefix(
        "adapters."
    ) and results["setting"] == dict(steps=10, lr=1e-3, std=0.1)


def package_rows():
    "(what, largest differences) against the `adapters` package, as recorded by nbs/bench/adapters."
    return [
        (f"{r['architecture']}: {r['kind']}", {k: r[k] for k in ("logits", "gradients", "weights")})
        for r in worker.read()["runs"]
    ]


in_its_environment = pytest.mark.skipif(
    not os.environ.get(worker.PYTHON), reason=f"{worker.PYTHON} names no interpreter with the adapters package"
)


@in_its_environment
def test_parity_with_the_package():
    runs, versions = worker.ask(os.environ[worker.PYTHON])
    check_runs(runs)
    assert versions["package"]["adapters"]


@in_its_environment
def test_the_comparison_with_the_package_can_fail(monkeypatch):
    # every kind reads what Houlsby's reads
    monkeypatch.setattr(methods_bottleneck.BottleneckPart, "read", lambda self, h: h)
    runs, _ = worker.ask(os.environ[worker.PYTHON])
    assert all((r["logits"] > 1e-4) == (r["kind"] != "houlsby") for r in runs)


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


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(name):
    from transformers.activations import ACT2FN

    x = torch.linspace(-4, 4, 101)
    theirs = F.leaky_relu if name == "leakyrelu" else ACT2FN[name]
    assert gap([(ACTIVATIONS[name](x), theirs(x))]) < 1e-6


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
    hook = model.model.layers[0].post_attention_layernorm.register_forward_pre_hook(
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


def test_a_stream_that_is_not_seen():
    model = Bottleneck("parallel", 4, layout=Layout("self_attn", "mlp", "post_attention_layernorm")).apply(
        make("Llama")
    )
    block = model.model.layers[0]
    with pytest.raises(RuntimeError, match="model.layers.0 saw no stream: post_attention_layernorm has to be called"):
        block.mlp(torch.randn(1, 2, d))


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


def test_an_unknown_block_is_refused_and_can_be_named():
    torch.manual_seed(0)
    model = bart().train()
    before, want = snapshot(model), logits(model)
    with pytest.raises(
        ValueError,
        match=(
            r"no transformer block is recognised in BartForConditionalGeneration.*Looked "
            r"for.*input_layernorm.*BartEncoderLayer with self_attn, self_attn_layer_norm, fc1, fc2, "
            r"final_layer_norm.*layout=Layout"
        ),
    ):
        Bottleneck().apply(model)
    assert untouched(model, before)
    layout = Layout("self_attn", "fc2", "fc1", "final_layer_norm")
    for kind in KINDS:
        Bottleneck(kind, 4, layout=layout).apply(model)
        assert torch.equal(logits(model), want) and not torch.equal(logits(busy(model)), want)
        remove_(model)
    with pytest.raises(ValueError, match="Looked for modules that hold exactly attn, fc2, fc1"):
        find_blocks(model, Layout("attn", "fc2", "fc1"))


def test_a_named_layout_survives_the_disk(tmp_path):
    torch.manual_seed(0)
    model = busy(Bottleneck("pfeiffer", 4, layout=Layout("self_attn", "fc2", "fc1", "final_layer_norm")).apply(bart()))
    torch.manual_seed(0)
    again = load_adapter(bart(), save_adapter(model, tmp_path))
    assert again.ftbook_method == model.ftbook_method and torch.equal(logits(again.eval()), logits(model.eval()))


def test_more_in_a_block_than_is_known():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    model = Gemma2ForCausalLM(
        Gemma2Config(
            hidden_size=d,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=vocab,
        )
    )
    with pytest.raises(ValueError, match="Gemma2DecoderLayer with .*pre_feedforward_layernorm"):
        Bottleneck().apply(model)
    mixed = make("Llama")
    mixed.model.layers[1].extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"not all of model\.layers are recognised: a LlamaDecoderLayer has .*extra"):
        Bottleneck().apply(mixed)
    assert not hasattr(mixed, "ftbook_method")


families = {
    "Mistral": "model.layers.0",
    "Qwen3": "model.layers.0",
    "Phi3": "model.layers.0",
    "Gemma": "model.layers.0",
    "Starcoder2": "model.layers.0",
    "Mixtral": "model.layers.0",
    "GPTNeo": "transformer.h.0",
    "GPTBigCode": "transformer.h.0",
    "Roberta": "roberta.encoder.layer.0",
    "Electra": "electra.encoder.layer.0",
    "Deberta": "deberta.encoder.layer.0",
    "MT5": "encoder.block.0",
}


def family(name):
    "A small model of another family."
    import transformers

    small = dict(
        vocab_size=vocab,
        hidden_size=d,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
        head_dim=8,
    )
    bert_like = {k: v for k, v in small.items() if k not in ("num_key_value_heads", "head_dim")} | dict(
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, embedding_size=d
    )
    more = dict(
        GPTNeo=dict(
            vocab_size=vocab,
            hidden_size=d,
            num_layers=1,
            num_heads=heads,
            attention_types=[[["global"], 1]],
            max_position_embeddings=64,
            bos_token_id=0,
            eos_token_id=1,
        ),
        GPTBigCode=dict(
            vocab_size=vocab,
            n_embd=d,
            n_layer=1,
            n_head=heads,
            n_positions=64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=1,
        ),
        MT5=dict(
            vocab_size=vocab,
            d_model=d,
            d_kv=8,
            d_ff=64,
            num_layers=1,
            num_heads=heads,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        ),
        Mixtral=small | dict(num_local_experts=2),
    )
    head = dict(
        Roberta="ForMaskedLM", Electra="ForMaskedLM", Deberta="ForMaskedLM", MT5="ForConditionalGeneration"
    ).get(name, "ForCausalLM")
    config = getattr(transformers, f"{name}Config")(
        **more.get(name, bert_like if name in ("Roberta", "Electra", "Deberta") else small)
    )
    torch.manual_seed(0)
    return getattr(transformers, name + head)(config).eval()


def hands_on(model, place, part):
    "What a block is given, adds, and hands on."
    seen, block = {}, model.get_submodule(place.block)
    first = lambda out: out[0] if isinstance(out, tuple) else out
    taps = [
        block.get_submodule(place.layout.stream).register_forward_pre_hook(lambda m, args: seen.update(x=args[0])),
        part.base.register_forward_hook(lambda m, a, out: seen.update(h=first(out))),
        block.register_forward_hook(lambda m, a, out: seen.update(out=first(out))),
    ]
    logits(model)
    for tap in taps:
        tap.remove()
    return seen


@every_kind
@pytest.mark.parametrize("name", [*small_models, *families])
def test_a_block_hands_on_what_the_table_says(name, kind):
    "x + h + s U act(D r) in every family, through the norm where one follows: the equation that a layout promises."
    model = busy(
        Bottleneck(kind, 4, "tanh").apply(make(name).eval() if name in small_models else family(name)), std=0.3
    )
    parts = {n: o for n, o in bottlenecks(model).items() if n == f"{o.place.block}.{o.place.layout.feed_forward}"}
    assert len(parts) == len({o.place.block for o in bottlenecks(model).values()}) and (
        name in small_models or next(iter(parts.values())).place.block == families[name]
    )
    for part in parts.values():
        seen = hands_on(model, part.place, part)
        x, h, norm = seen["x"], seen["h"], part.place.layout.norm
        through = model.get_submodule(f"{part.place.block}.{norm}") if norm else lambda z: z
        r = dict(houlsby=h, pfeiffer=through(x + h), parallel=x)[kind]
        want = through(x + h + part.method.scaling * part.up(torch.tanh(part.down(r))))
        assert gap([(seen["out"], want)]) < 1e-5 and gap([(want, through(x + h))]) > 1e-3


def test_decoders_with_cross_attention():
    from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel

    sizes = dict(vocab_size=vocab, hidden_size=d, num_hidden_layers=2, num_attention_heads=heads, intermediate_size=64)
    torch.manual_seed(0)
    for model in (
        BertLMHeadModel(BertConfig(**sizes, is_decoder=True, add_cross_attention=True)).eval(),
        GPT2LMHeadModel(
            GPT2Config(
                n_embd=d,
                n_layer=2,
                n_head=heads,
                vocab_size=vocab,
                n_positions=64,
                add_cross_attention=True,
                bos_token_id=0,
                eos_token_id=1,
            )
        ).eval(),
    ):
        other = torch.randn(2, 5, d)
        run = lambda: model(**batch(), encoder_hidden_states=other).logits.detach()
        want = run()
        for kind in KINDS:
            Bottleneck(kind, 4).apply(model)
            assert (
                len(bottlenecks(model)) == 2 * (1 + (kind == "houlsby"))
                and not any("cross" in n for n in bottlenecks(model))
                and torch.equal(run(), want)
            )
            busy(model)
            assert gap([(run(), want)]) > 1e-4
            remove_(model)


# Bad input


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(kind="compacter"), "kind='compacter' is not known.*houlsby, pfeiffer, parallel"),
        (dict(activation="sine"), "activation='sine' is not known.*relu"),
        (dict(init="ones"), "zero, normal"),
        (dict(bottleneck_size=0), "at least 1"),
        (dict(bottleneck_size=-4), "at least 1"),
        (dict(bottleneck_size=2.5), "whole number"),
        (dict(bottleneck_size=True), "bottleneck_size=True"),
        (dict(bottleneck_size="8"), "bottleneck_size='8'"),
        (dict(scaling=0), "other than 0"),
        (dict(scaling=float("nan")), "finite"),
        (dict(scaling="learned"), "scaling='learned'"),
        (dict(dropout=1), "below 1"),
        (dict(dropout=-0.1), "at least 0"),
        (dict(init_std=0), "above 0"),
        (dict(init_std=float("inf")), "finite"),
    ],
)
def test_bad_hyperparameters(wrong, said):
    with pytest.raises(ValueError, match=said):
        Bottleneck(**wrong)


@every_model
def test_a_bottleneck_wider_than_the_stream(name):
    model = make(name)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"bottleneck_size=33 is larger than the stream of .*0, which has 32 numbers"):
        Bottleneck("pfeiffer", 33).apply(model)
    assert untouched(model, before)
    Bottleneck("pfeiffer", 32).apply(model)


@pytest.mark.parametrize("method", [Bottleneck("houlsby", 4), Bottleneck("parallel", 4), IA3(), BitFit()])
def test_applied_twice(method):
    model = method.apply(make("Llama"))
    for again in (method, IA3()):
        with pytest.raises(ValueError, match="already has a method"):
            again.apply(model)


@every_kind
@every_model
def test_a_bottleneck_does_not_merge(name, kind):
    model = busy(Bottleneck(kind, 4).apply(make(name)))
    want = logits(model)
    with pytest.raises(ValueError, match="BottleneckPart cannot be merged"):
        merge_(model)
    assert torch.equal(logits(model), want)


def refused(load, folder, model, *said, error=ValueError):
    before = snapshot(model)
    with pytest.raises(error) as e:
        load(model, folder)
    assert all(o in str(e.value) for o in said), str(e.value)
    assert untouched(model, before)


borders = {
    "ftbook": (save_adapter, load_adapter, "adapter_model.safetensors"),
    "adapters": (save_for_adapters, load_from_adapters, "adapter.safetensors"),
}


@pytest.mark.parametrize("border", borders)
def test_files_that_do_not_fit(border, tmp_path):
    save, load, weights = borders[border]
    save(busy(Bottleneck("pfeiffer", 4).apply(make("Llama"))), tmp_path)
    torch.manual_seed(0)
    refused(load, tmp_path, make("GPT-2"), "does not fit", "has no place for")
    wide = llama_of_width(64)
    refused(load, tmp_path, wide, "is (4, 32) in the file and (4, 64) in the model") if border == "ftbook" else refused(
        load, tmp_path, wide, "(4, 32) in the file"
    )
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    whole = (tmp_path / weights).read_bytes()
    for n in (0, 4, len(whole) // 2, len(whole) - 1):
        (tmp_path / weights).write_bytes(whole[:n])
        refused(load, tmp_path, make("Llama"), f"{weights} is damaged", f"{n:,} bytes")
    (tmp_path / weights).write_bytes(whole)
    tensors = load_file(tmp_path / weights)
    name = next(k for k in tensors if "down" in k and k.endswith("weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, tmp_path / weights)
    refused(load, tmp_path, make("Llama"), name, "1 values that are NaN")
    del tensors[name]
    save_file(tensors, tmp_path / weights)
    refused(load, tmp_path, make("Llama"), "the file lacks")
    (tmp_path / weights).unlink()
    refused(load, tmp_path, make("Llama"), f"has no {weights}", error=FileNotFoundError)
    (tmp_path / "adapter_config.json").write_text("{")
    refused(load, tmp_path, make("Llama"), "is not valid JSON")
    (tmp_path / "adapter_config.json").unlink()
    refused(load, tmp_path, make("Llama"), "has no adapter_config.json", error=FileNotFoundError)
    assert config


def llama_of_width(width):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=2,
            vocab_size=vocab,
        )
    )


@pytest.mark.parametrize("border", borders)
def test_nan_is_not_saved(border, tmp_path):
    model = busy(Bottleneck("pfeiffer", 4).apply(make("Llama")))
    with torch.no_grad():
        bottlenecks(model)["model.layers.1.mlp"].up.bias[3] = float("inf")
    with pytest.raises(ValueError, match="not saved.*NaN or infinite"):
        borders[border][0](model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_saving_replaces_and_a_failure_does_not(tmp_path, monkeypatch):
    model = save_for_adapters(m := busy(Bottleneck("pfeiffer", 4).apply(make("Llama"))), tmp_path) and m
    old = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    busy(model, seed=5)

    def full(tensors, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(methods_package_adapters, "save_file", full)
    with pytest.raises(OSError, match="cannot save the adapter in .*No space left"):
        save_for_adapters(model, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old
    monkeypatch.undo()
    save_for_adapters(model, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == set(old) and (tmp_path / "adapter.safetensors").read_bytes() != old[
        "adapter.safetensors"
    ]


def test_wrong_doors(tmp_path):
    with pytest.raises(ValueError, match="no method on it"):
        save_for_adapters(make("Llama"), tmp_path / "a")
    with pytest.raises(ValueError, match="no bottleneck adapter: use `save_adapter`"):
        save_for_adapters(IA3().apply(make("Llama")), tmp_path / "a")
    model = Bottleneck("pfeiffer", 4).apply(make("Llama"))
    for name in ("a.b", ""):
        with pytest.raises(ValueError, match="without dots"):
            save_for_adapters(model, tmp_path / "a", name)
    assert not (tmp_path / "a").exists()
    save_adapter(model, tmp_path / "ours")
    refused(load_from_adapters, tmp_path / "ours", make("Llama"), "use `load_adapter`")
    save_for_adapters(model, tmp_path / "theirs")
    refused(load_adapter, tmp_path / "theirs", make("Llama"), "no peft_type")
    with pytest.raises(ValueError, match="already has a method"):
        load_from_adapters(model, tmp_path / "theirs")


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    about = json.loads(path.read_text())
    about["config"] |= changes
    path.write_text(json.dumps(about))


@pytest.mark.parametrize(
    "field, value",
    [
        ("ln_before", True),
        ("ln_after", True),
        ("use_gating", True),
        ("residual_before_ln", "post_add"),
        ("original_ln_after", False),
        ("original_ln_before", False),
        ("phm_layer", True),
        ("inv_adapter", "nice"),
        ("cross_adapter", True),
        ("leave_out", [0]),
        ("stochastic_depth", 0.1),
        ("scaling", "learned"),
        ("scaling", "channel"),
        ("reduction_factor", {"0": 2, "default": 4}),
        ("mh_adapter", True),
        ("output_adapter", False),
        ("adapter_residual_before_ln", True),
        ("a_field_of_next_year", 7),
    ],
)
def test_fields_of_the_package_that_would_change_the_result(field, value, tmp_path):
    save_for_adapters(Bottleneck("pfeiffer", 4).apply(make("Llama")), tmp_path)
    change_config(tmp_path, **{field: value})
    refused(load_from_adapters, tmp_path, make("Llama"), "adapter_config.json", f"{field}=")


def test_fields_of_the_package_that_would_not(tmp_path):
    model = busy(Bottleneck("pfeiffer", 4).apply(make("Llama")))
    save_for_adapters(model, tmp_path)
    change_config(
        tmp_path,
        init_weights="bert",
        phm_dim=4,
        phm_rank=1,
        hypercomplex_nonlinearity="glorot-uniform",
        init_weights_seed=3,
        inv_adapter_reduction_factor=2,
    )
    assert torch.equal(logits(load_from_adapters(make("Llama"), tmp_path)), logits(model))
    for other in ({"architecture": "lora", "r": 8}, "pfeiffer"):
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "config": other}))
        refused(load_from_adapters, tmp_path, make("Llama"), "no bottleneck adapter")


def test_before_there_were_versions_gelu_was_another(tmp_path):
    model = busy(Bottleneck("pfeiffer", 4, "gelu_new").apply(make("Llama")), std=0.5)
    save_for_adapters(model, tmp_path)
    change_config(tmp_path, non_linearity="gelu")
    assert load_from_adapters(make("Llama"), tmp_path).ftbook_method.activation == "gelu"
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "version"}))
    again = load_from_adapters(make("Llama"), tmp_path)
    assert again.ftbook_method.activation == "gelu_new" and torch.equal(logits(again), logits(model))


def test_a_head_beside_the_adapter(tmp_path):
    model = busy(Bottleneck("pfeiffer", 4).apply(make("Llama")))
    save_for_adapters(model, tmp_path)
    head = tmp_path / "model_head.safetensors"
    save_file({"lm_head.weight": model.lm_head.weight.detach().clone()}, head)
    assert torch.equal(logits(load_from_adapters(make("Llama"), tmp_path)), logits(model))
    for other in (
        {"lm_head.weight": torch.randn(vocab, d)},
        {"heads.x.1.weight": torch.randn(2, d)},
        {"lm_head.weight": torch.randn(3, d)},
    ):
        save_file(other, head)
        refused(load_from_adapters, tmp_path, make("Llama"), "holds a head that is not the model's", next(iter(other)))
    head.rename(tmp_path / "pytorch_model_head.bin")
    refused(load_from_adapters, tmp_path, make("Llama"), "pickle")


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama"])
def test_saved_with_a_head_and_loaded_without(name, tmp_path):
    model = busy(Bottleneck("houlsby", 4).apply(make(name)))
    save_for_adapters(model, tmp_path)
    bare = load_from_adapters(make(name).base_model, tmp_path)
    with torch.no_grad():
        assert torch.equal(bare(batch()["input_ids"])[0], model.base_model(batch()["input_ids"])[0])
    save_for_adapters(bare, tmp_path / "bare")
    assert torch.equal(logits(load_from_adapters(make(name), tmp_path / "bare")), logits(model))


@every_kind
@every_model
def test_round_trips(name, kind, tmp_path):
    method = Bottleneck(kind, 7, "gelu", 1.5, dropout=0.25)
    model = busy(method.apply(make(name))).eval()
    for save, load, _ in borders.values():
        again = load(make(name), save(model, tmp_path / save.__name__)).eval()
        assert (
            torch.equal(logits(again), logits(model))
            and again.ftbook_method == method
            and trainable_summary(again).trained == trainable_summary(model).trained
        )
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.*")}
    for save, *_ in borders.values():
        save(model, tmp_path / save.__name__)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*.*")}


def test_an_unknown_field_of_ours(tmp_path):
    save_adapter(Bottleneck("pfeiffer", 4).apply(make("Llama")), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "gated": True}))
    refused(load_adapter, tmp_path, make("Llama"), "gated=True")


def test_the_factor_gives_the_width_back():
    for width in (32, 64, 100, 576, 768, 1000, 1024, 4096):
        assert all(int(width // methods_package_adapters._factor(width, m)) == m for m in range(1, width + 1))


# (IA)3 and BitFit against peft


def peft_twin(model, config):
    import peft

    return peft.get_peft_model(model, config)


def ten_steps(models, pairs, weight_decay=0.01):
    "Largest differences of logits, gradients, and weights after ten steps of AdamW."
    optimizers, found = (
        [torch.optim.AdamW([p[i] for p in pairs], lr=1e-3, weight_decay=weight_decay) for i in (0, 1)],
        {},
    )
    for step in range(10):
        outs = [m(**batch(step)) for m in models]
        for out, o in zip(outs, optimizers):
            o.zero_grad()
            out.loss.backward()
        if step == 0:
            found = dict(logits=gap([[o.logits for o in outs]]), gradients=gap((p.grad, q.grad) for p, q in pairs))
        if step == 0:
            assert max(float(p.grad.abs().max()) for p, _ in pairs) > 1e-4
        for o in optimizers:
            o.step()
    return found | dict(weights=gap(pairs))


peft_models = ["Llama", "Qwen2", "GPT-2", "BERT", "T5"]
ia3_cases = [(name, dict()) for name in peft_models] + [
    ("Llama", dict(target_modules="all-linear")),
    ("Llama", dict(target_modules=["q_proj", "up_proj", "down_proj"], feedforward_modules=["up_proj", "down_proj"])),
    ("BERT", dict(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"])),
    ("GPT-2", dict(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])),
    ("Qwen2", dict(target_modules=r".*\.1\..*(k_proj|v_proj|down_proj)", feedforward_modules=r".*down_proj")),
    ("T5", dict(target_modules=["k", "v", "wo"], feedforward_modules=["wo"])),
]


def ia3_pair(name, given):
    ours = busy(IA3(**given).apply(make(name)), 0.2, 1.0)
    config = methods_files.adapter_config(ours)
    theirs = (
        dict(target_modules=config["target_modules"], feedforward_modules=config["feedforward_modules"])
        if not given or len(given) == 1
        else given
    )
    import peft

    theirs = peft_twin(make(name), peft.IA3Config(fan_in_fan_out=config["fan_in_fan_out"], **theirs))
    pairs = [(ours.get_parameter(n), theirs.get_parameter(f"base_model.model.{n}.default")) for n in ours.ftbook_added]
    assert len(pairs) == sum(p.requires_grad for p in theirs.parameters())
    for p, q in pairs:
        q.data.copy_(p.data)
    return ours, theirs, pairs


def ia3_rows():
    "(what, largest differences) of (IA)3 against peft."
    rows = []
    for name, given in ia3_cases:
        ours, theirs, pairs = ia3_pair(name, given)
        rows.append(
            (f"{name}: {', '.join(f'{k} {v}' for k, v in given.items())[:70]}", ten_steps((ours, theirs), pairs))
        )
    return rows


@pytest.mark.parametrize("name, given", ia3_cases)
def test_ia3_crosses_the_border(name, given, tmp_path):
    import peft

    ours, theirs, _ = ia3_pair(name, given)
    save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    there, here = (
        peft.PeftModel.from_pretrained(make(name), tmp_path / "ours"),
        load_adapter(make(name), tmp_path / "theirs"),
    )
    assert gap((logits(m), logits(ours)) for m in (there, here)) < 1e-5
    mine, his = (load_file(tmp_path / o / "adapter_model.safetensors") for o in ("ours", "theirs"))
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in his.items()}
    configs = [json.loads((tmp_path / o / "adapter_config.json").read_text()) for o in ("ours", "theirs")]
    assert set(configs[0]) <= set(configs[1]) and all(
        configs[0][k] == configs[1][k] for k in ("peft_type", "fan_in_fan_out", "init_ia3_weights", "modules_to_save")
    )


@pytest.mark.parametrize("name", peft_models)
def test_ia3_does_nothing_counts_and_merges(name):
    model = make(name).requires_grad_(False)
    before, want = snapshot(model), logits(model)
    IA3().apply(model)
    assert torch.equal(logits(model), want)
    n = {
        "Llama": 2 * (16 + 16 + 64),
        "Qwen2": 2 * (16 + 16 + 64),
        "GPT-2": 2 * (96 + 128),
        "BERT": 2 * (32 + 32 + 64),
        "T5": 6 * 64 + 4 * 64,
    }[name]
    assert trainable_summary(model).trained == n
    busy(model, 0.2, 1.0)
    changed = logits(model)
    assert gap([(changed, want)]) > 1e-4 and gap([(logits(merge_(model)), changed)]) < 1e-5
    assert torch.equal(logits(unmerge_(model)), changed)
    plain = remove_(merge_(model, keep=False))
    assert not parts_of(plain) and gap([(logits(plain), changed)]) < 1e-5 and not untouched(plain, before)


def test_ia3_scales_where_the_paper_says():
    "k = l_k * W_k x, and the second layer of the feed-forward sees l_f * its input."
    model, x, z = busy(IA3().apply(make("Llama")), 0.2, 1.0), torch.randn(3, d), torch.randn(3, 64)
    block = model.model.layers[0]
    k, down = block.self_attn.k_proj, block.mlp.down_proj
    assert (
        gap([(k(x), k.ia3_l[:, 0] * (x @ k.base.weight.t())), (down(z), (down.ia3_l[0] * z) @ down.base.weight.t())])
        < 1e-6
    )


@pytest.mark.parametrize("field, value", [("exclude_modules", ["k_proj"]), ("a_field_of_next_year", 7)])
def test_ia3_fields_that_would_change_the_result(field, value, tmp_path):
    save_adapter(IA3().apply(make("Llama")), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    refused(load_adapter, tmp_path, make("Llama"), field)


def test_ia3_bad_targets():
    with pytest.raises(ValueError, match="target_modules is empty"):
        IA3([])
    with pytest.raises(ValueError, match=r"matches nothing.*q_proj \(2\)"):
        IA3(["query"]).apply(make("Llama"))
    with pytest.raises(ValueError, match="keys and values are not found by name.*There are 0, 1"):
        IA3().apply(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    model = nn.ModuleDict({"k_proj": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match="second feed-forward layers"):
        IA3().apply(model)
    assert model["k_proj"].weight.requires_grad


def test_ia3_files_that_do_not_fit(tmp_path):
    save_adapter(IA3().apply(make("Llama")), tmp_path)
    refused(load_adapter, tmp_path, llama_of_width(64), "k_proj.ia3_l is (16, 1) in the file and (32, 1) in the model")
    refused(load_adapter, tmp_path, make("GPT-2"), "does not fit")


def classifier():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    return LlamaForSequenceClassification(
        LlamaConfig(
            hidden_size=d,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=2,
            vocab_size=vocab,
            num_labels=3,
            pad_token_id=0,
        )
    )


def classes(model, seed=1):
    with torch.no_grad():
        return model(batch(seed)["input_ids"]).logits


@pytest.mark.parametrize("method", [IA3(modules_to_save=["score"]), BitFit(modules_to_save=["score"])])
def test_a_head_that_is_trained_whole_crosses_the_border(method, tmp_path):
    import peft

    model = method.apply(classifier())
    busy(model, 0.1, 1.0 if isinstance(method, IA3) else 0.0)
    save_adapter(model, tmp_path)
    there, here = peft.PeftModel.from_pretrained(classifier(), tmp_path), load_adapter(classifier(), tmp_path)
    assert gap((classes(m), classes(model)) for m in (there, here)) < 1e-5
    assert gap([(classes(model), classes(classifier()))]) > 1e-3


def biases_of(name, norms=False):
    """The model with BitFit, the same with its own biases thawed, and the pairs: offset and bias.

    The frozen biases are not zero.
    """
    base = make(name)
    with torch.no_grad():
        for n in methods_targets.find_modules(base):
            if (b := base.get_submodule(n).bias) is not None:
                b.normal_(std=0.1)
    ours, plain = BitFit(norms=norms).apply(copy.deepcopy(base)), base.requires_grad_(False)
    busy(ours)
    pairs = []
    for n, part in parts_of(ours).items():
        bias = plain.get_submodule(n).bias.requires_grad_()
        bias.data += part.offset.data
        pairs.append((part, bias))
    return ours, plain, pairs


def bitfit_rows():
    "(what, largest differences) of BitFit against the model's own biases, thawed."
    rows = {}
    for model, norms in itertools.product(("GPT-2", "BERT", "DistilBERT"), (False, True)):
        name = f"{model}, layer norms too" if norms else model
        ours, plain, pairs = biases_of(model, norms)
        optimizers = [
            torch.optim.AdamW(ps, lr=1e-3, weight_decay=0.0)
            for ps in ([o.offset for o, _ in pairs], [b for _, b in pairs])
        ]
        for step in range(10):
            outs = [m(**batch(step)) for m in (ours, plain)]
            for out, o in zip(outs, optimizers):
                o.zero_grad()
                out.loss.backward()
            if step == 0:
                rows[name] = [gap([[o.logits for o in outs]]), gap((o.offset.grad, b.grad) for o, b in pairs)]
            for o in optimizers:
                o.step()
        rows[name].append(gap((o.base.bias + o.offset, b) for o, b in pairs))
    return [(name, dict(zip(("logits", "gradients", "weights"), found))) for name, found in rows.items()]


@pytest.mark.parametrize("name", peft_models)
def test_bitfit_does_nothing_counts_and_crosses_the_border(name, tmp_path):
    import peft

    model = make(name).requires_grad_(False)
    want = logits(model)
    BitFit().apply(model)
    assert torch.equal(logits(model), want)
    assert trainable_summary(model).trained == sum(
        methods_targets.linear_size(o.base)[1] for o in parts_of(model).values()
    )
    busy(model)
    save_adapter(model, tmp_path)
    config, keys = (
        json.loads((tmp_path / "adapter_config.json").read_text()),
        load_file(tmp_path / "adapter_model.safetensors"),
    )
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["lora_bias"]) == ("LORA", 1, 1, True)
    assert all(not t.any() for k, t in keys.items() if not k.endswith("lora_B.bias")) and len(keys) == 3 * len(
        model.ftbook_added
    )
    with pytest.warns(UserWarning, match="lora_bias") if name in ("Llama", "Qwen2", "T5") else contextlib.nullcontext():
        there = peft.PeftModel.from_pretrained(make(name), tmp_path)
    here = load_adapter(make(name), tmp_path)
    assert type(here.ftbook_method) is BitFit and gap((logits(m), logits(model)) for m in (there, here)) < 1e-5
    assert gap([(logits(model), want)]) > 1e-3


@pytest.mark.parametrize("name", ["GPT-2", "BERT", "DistilBERT"])
def test_bitfit_with_norms_trains_every_bias_as_in_the_paper(name, tmp_path):
    model = make(name)
    biases = {n: p.numel() for n, p in model.named_parameters() if n.endswith("bias")}
    heads = {n: m.bias for n, m in model.named_modules() if m is methods_targets.head_of(model)}
    left = [n for n, p in model.named_parameters() if any(p is b for b in heads.values())]
    BitFit(norms=True).apply(model)
    assert trainable_summary(model).trained == sum(biases.values()) - sum(biases[n] for n in left)
    want = logits(busy(model))
    here = load_adapter(make(name), save_adapter(model, tmp_path))
    assert here.ftbook_method == BitFit(norms=True) and torch.equal(logits(here), want)
    assert gap([(logits(merge_(model)), want)]) < 1e-5
    assert torch.equal(logits(unmerge_(model)), want)


@pytest.mark.parametrize("name", ["Llama", "T5"])
def test_a_model_whose_norms_have_no_bias_is_refused(name):
    model = make(name)
    with pytest.raises(ValueError, match="norms=True, and .* has no layer norm with a bias"):
        BitFit(norms=True).apply(model)
    assert not hasattr(model, "ftbook_method")


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


@pytest.mark.parametrize(
    "name, first, n",
    [
        ("Llama", "model.layers.0.self_attn.q_proj", 14),
        ("Qwen2", "model.layers.0.self_attn.o_proj", 8),
        ("T5", "encoder.block.0.layer.0.SelfAttention.q", 36),
    ],
)
def test_bitfit_without_a_bias_does_not_merge(name, first, n):
    model = busy(BitFit().apply(make(name)))
    want = logits(model)
    with pytest.raises(ValueError, match=f"{re.escape(first)} has no bias to merge into, like {n} of the layers"):
        merge_(model)
    assert not any(o.merged for o in parts_of(model).values()) and torch.equal(logits(model), want)
    if name == "Qwen2":
        some = busy(BitFit(["q_proj", "k_proj", "v_proj"]).apply(make(name)))
        want = logits(some)
        assert gap([(logits(merge_(some)), want)]) < 1e-5


def test_a_new_bias_would_be_dropped(tmp_path):
    "Why BitFit does not merge into a layer without a bias: transformers writes the new one and does not read it."
    from transformers import AutoModelForCausalLM

    model = make("Llama")
    model.model.layers[0].self_attn.q_proj.bias = nn.Parameter(torch.ones(d))
    model.save_pretrained(tmp_path)
    assert "model.layers.0.self_attn.q_proj.bias" in load_file(tmp_path / "model.safetensors")
    assert AutoModelForCausalLM.from_pretrained(tmp_path).model.layers[0].self_attn.q_proj.bias is None


def test_a_lora_is_not_taken_for_bitfit(tmp_path):
    from ftbook.methods.lora_method import LoRA  # noqa: F401, makes LORA known

    save_adapter(busy(BitFit().apply(make("Llama"))), tmp_path)
    weights, path = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, config = load_file(weights), json.loads(path.read_text())
    first = next(k for k in tensors if k.endswith("q_proj.lora_A.weight"))
    save_file(tensors | {first: torch.ones_like(tensors[first])}, weights, metadata={methods_files.MARK: "BITFIT"})
    refused(load_adapter, tmp_path, make("Llama"), "is a LoRA and no BitFit", first)
    save_file(tensors, weights, metadata={methods_files.MARK: "BITFIT"})
    for field, value in (("r", 2), ("lora_alpha", 2), ("use_dora", True), ("rank_pattern", {"q_proj": 2})):
        path.write_text(json.dumps({**config, field: value}))
        refused(load_adapter, tmp_path, make("Llama"), f"{field}={value!r}")


def test_bitfit_bad_targets():
    with pytest.raises(ValueError, match="target_modules is empty"):
        BitFit([])
    with pytest.raises(ValueError, match=r"matches nothing.*q_proj \(2\)"):
        BitFit(["query"]).apply(make("Llama"))


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


def test_targets_that_would_mean_more():
    "A name that is the end of another is written so that PEFT means the one alone."
    deep = nn.ModuleDict(
        {
            "v_proj": nn.Linear(4, 4),
            "deep": nn.ModuleDict({"v_proj": nn.Linear(4, 4), "down_proj": nn.Linear(4, 4)}),
            "xdown_proj": nn.Linear(4, 4),
            "down_proj": nn.Linear(4, 4),
        }
    )
    config = IA3(r"v_proj|down_proj|xdown_proj", r"down_proj").apply(deep).ftbook_method.to_peft(deep)
    assert (
        config["target_modules"] == "v_proj|xdown_proj|down_proj"
        and config["feedforward_modules"] == "down_proj"
        and isinstance(config["feedforward_modules"], str)
    )
