"Bottleneck adapters, (IA)3 and BitFit: against plain torch, against peft, against the `adapters` package."

import contextlib, itertools, json, math, os

import pytest, torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from ftbook.methods import bottleneck as methods_bottleneck
from ftbook.methods import files as methods_files
from ftbook.methods import targets as methods_targets
from ftbook.methods.bottleneck import ACTIVATIONS, KINDS
from ftbook.methods.bitfit import BitFit
from ftbook.methods.bottleneck_method import Bottleneck, bottlenecks
from ftbook.methods.ia3 import IA3
from ftbook.methods.package_adapters import load_from_adapters, save_for_adapters
from ftbook.methods.files import load_adapter, save_adapter
from ftbook.methods.fold import merge_, remove_, unmerge_
from ftbook.methods.parts import parts_of
from ftbook.methods.summary import trainable_summary
from rivals import variable
from sides.bottleneck import TIED_HEAD
from studies.adapters import ask, plan
from cases.bottleneck import (
    batch,
    biases_of,
    borders,
    busy,
    change_config,
    d,
    every_kind,
    every_model,
    gap,
    heads,
    logits,
    make,
    peft_models,
    refused,
    small_models,
    snapshot,
    untouched,
    vocab,
)


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


def check_runs(runs):
    assert [{k: r[k] for k in ("architecture", "kind")} for r in runs] == list(plan([]))
    for r in runs:
        assert all(
            r[k] <= 1e-5 for k in ("base", "logits", "gradients", "weights", "after", "theirs_read", "native_read")
        ), r
        assert r["effect"] > 0.01 and r["smallest_gradient"] > 1e-7 and not r["lost"] and r["tensors"] >= 8
    assert {r["architecture"] for r in runs if r["head"]} == {r["architecture"] for r in runs} - set(TIED_HEAD)


in_its_environment = pytest.mark.skipif(
    not os.environ.get(variable("adapters")), reason="no environment with the adapters package is named"
)


@in_its_environment
def test_parity_with_the_package():
    runs = ask()
    check_runs(runs)
    assert all(r["rival"]["adapters"] for r in runs)


@in_its_environment
def test_the_comparison_with_the_package_can_fail(monkeypatch):
    # every kind reads what Houlsby's reads
    monkeypatch.setattr(methods_bottleneck.BottleneckPart, "read", lambda self, h: h)
    assert all((r["logits"] > 1e-4) == (r["kind"] != "houlsby") for r in ask())


# Does nothing, then something


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(name):
    from transformers.activations import ACT2FN

    x = torch.linspace(-4, 4, 101)
    theirs = F.leaky_relu if name == "leakyrelu" else ACT2FN[name]
    assert gap([(ACTIVATIONS[name](x), theirs(x))]) < 1e-6


# Where

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
