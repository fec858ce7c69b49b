"LoRA against peft, and against everything that may happen to a layer between forward and backward."

import copy, gc, json, math, warnings, weakref

import pytest, torch
from torch import nn

from ftbook.methods.lora_files import as_plain
from ftbook.methods.lora_method import LoRA
from ftbook.methods.lora_embedding import LoRAEmbedding
from ftbook.methods.lora import LoRALinear
from ftbook.methods.siblings import Siblings, share_siblings_
from ftbook.methods.switching import add_adapter_, adapter_names, fewer_ranks, use_adapter_
from ftbook.methods.low_rank import low_rank
from ftbook.methods.lora_variants import param_groups
from ftbook.methods.dora import row_norms
from ftbook.methods.parts import Whole, parts_of
from ftbook.methods.files import load_adapter, save_adapter
from ftbook.methods.fold import merge_, remove_, unmerge_
from ftbook.methods.summary import trainable_summary
from tiny import random_batch, seeded

vocab = 60


def llama(tied=False, **kw):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=vocab,
            tie_word_embeddings=tied,
            **kw,
        )
    )


def qwen():
    from transformers import Qwen2Config, Qwen2ForCausalLM  # biases on q, k and v

    return Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=vocab,
        )
    )


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel  # Conv1D

    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=32,
            n_layer=2,
            n_head=4,
            vocab_size=vocab,
            n_positions=64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def bert():
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            vocab_size=vocab,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            vocab_size=vocab,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        )
    )


small_models = {"Llama": llama, "Qwen2": qwen, "GPT-2": gpt2, "BERT": bert, "T5": t5}


def make(name, seed=0):
    return seeded(small_models[name], seed)


def batch(*args, **kw):
    return random_batch(vocab, *args, **kw)


def peft_twin(model, **config):
    "The same adapter in peft's form."
    import peft

    given = {"target_modules": "all-linear", **config}
    return peft.get_peft_model(model, peft.LoraConfig(**given))


def name_in_peft(n):
    "Where peft keeps a parameter that is called `n` in ours."
    head, _, last = n.rpartition(".")
    if head.endswith(".whole"):
        return f"base_model.model.{head.removesuffix('.whole')}.modules_to_save.default.{last}"
    where = {
        "lora_bias": "lora_B.default.bias",
        "lora_embedding_A": "lora_embedding_A.default",
        "lora_embedding_B": "lora_embedding_B.default",
    }
    return f"base_model.model.{head}.{where.get(last, f'{last}.default.weight')}"


def in_step(ours, theirs, std=0.1):
    "Give both models the same numbers, with B and what else begins at zero no longer zero; return the pairs."
    pairs = {n: (ours.get_parameter(n), theirs.get_parameter(name_in_peft(n))) for n in ours.ftbook_added}
    assert sum(p.requires_grad for p in theirs.parameters()) == len(pairs)
    for n, (p, q) in pairs.items():
        if n.endswith(("lora_B", "lora_bias", "embedding_A")):
            nn.init.normal_(p, std=std)
        if n.endswith("magnitude_vector"):
            p.data.mul_(1 + std * torch.randn_like(p))
        q.data.copy_(p.data)
    return pairs


def gap(pairs):
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


def grads(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def compare(ours, theirs, steps=10, lr=1e-3, std=0.1, begun=False, lr_ratio=None):
    """Largest differences of logits, gradients and, after `steps` of AdamW, weights.

    An adapter that has `begun` in the weights is moved from there, not put elsewhere.
    """
    if begun:
        pairs, found = (
            {n: (ours.get_parameter(n), theirs.get_parameter(name_in_peft(n))) for n in ours.ftbook_added},
            {},
        )
        assert all(torch.allclose(p.abs(), q.abs(), atol=1e-4) for p, q in pairs.values())
        for p, q in pairs.values():
            p.data.add_(std * torch.randn_like(p))
            q.data.copy_(p.data)
    else:
        pairs, found = in_step(ours, theirs, std), {}
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=lr) for m in (ours, theirs)]
    if lr_ratio:
        from peft.optimizers import create_loraplus_optimizer

        optimizers = [
            torch.optim.AdamW(param_groups(ours, lr)),
            create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=lr_ratio),
        ]
    for i in range(max(steps, 1)):
        outs = []
        for m, o in zip((ours, theirs), optimizers):
            torch.manual_seed(i)  # the same dropout masks
            outs.append(m(**batch(i)))
            o.zero_grad()
            outs[-1].loss.backward()
        if i == 0:
            found.update(
                logits=gap([[o.logits for o in outs]]), gradients=gap((p.grad, q.grad) for p, q in pairs.values())
            )
        if steps:
            [o.step() for o in optimizers]
        if i == 0:
            assert all(p.grad.abs().max() > 1e-7 for p, _ in pairs.values()), "a comparison of zeros proves nothing"
    if steps:
        found["weights"] = gap(pairs.values())
    return found


# Same as the library

cases = [
    ("Llama", dict(rank=4, alpha=8), dict(r=4, lora_alpha=8)),
    ("Llama", dict(rank=4, alpha=3, use_rslora=True), dict(r=4, lora_alpha=3, use_rslora=True)),
    ("Llama", dict(rank=4, alpha=8, dropout=0.3), dict(r=4, lora_alpha=8, lora_dropout=0.3)),
    (
        "Llama",
        dict(rank=4, alpha=8, target_modules=["q_proj", "v_proj"]),
        dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    ),
    (
        "Llama",
        dict(rank=4, alpha=8, target_modules=r".*\.1\..*_proj"),
        dict(r=4, lora_alpha=8, target_modules=r".*\.1\..*_proj"),
    ),
    (
        "Llama",
        dict(rank=4, alpha=8, rank_pattern={"q_proj": 8, r"layers\.1\.mlp.*": 2}, alpha_pattern={"down_proj": 3}),
        dict(r=4, lora_alpha=8, rank_pattern={"q_proj": 8, r"layers\.1\.mlp.*": 2}, alpha_pattern={"down_proj": 3}),
    ),
    (
        "Llama",
        dict(
            rank=4,
            alpha=8,
            exclude_modules=["k_proj"],
            target_modules=["q_proj", "k_proj", "up_proj"],
            layers_to_transform=[1],
            layers_pattern="layers",
        ),
        dict(
            r=4,
            lora_alpha=8,
            exclude_modules=["k_proj"],
            target_modules=["q_proj", "k_proj", "up_proj"],
            layers_to_transform=[1],
            layers_pattern="layers",
        ),
    ),
    (
        "Llama",
        dict(rank=4, alpha=8, modules_to_save=["lm_head", "norm"]),
        dict(r=4, lora_alpha=8, modules_to_save=["lm_head", "norm"]),
    ),
    (
        "Llama",
        dict(rank=4, alpha=8, target_modules=["embed_tokens", "q_proj"]),
        dict(r=4, lora_alpha=8, target_modules=["embed_tokens", "q_proj"]),
    ),
    ("Llama", dict(rank=4, alpha=8, lora_bias=True), dict(r=4, lora_alpha=8, lora_bias=True)),
    ("Llama", dict(rank=4, alpha=8, use_dora=True), dict(r=4, lora_alpha=8, use_dora=True)),
    ("Qwen2", dict(rank=4, alpha=8, use_dora=True), dict(r=4, lora_alpha=8, use_dora=True)),
    ("GPT-2", dict(rank=4, alpha=8, use_dora=True), dict(r=4, lora_alpha=8, use_dora=True, fan_in_fan_out=True)),
    ("BERT", dict(rank=4, alpha=8, use_dora=True), dict(r=4, lora_alpha=8, use_dora=True)),
    ("T5", dict(rank=4, alpha=8, use_dora=True), dict(r=4, lora_alpha=8, use_dora=True)),
    (
        "Llama",
        dict(rank=4, alpha=8, use_dora=True, dropout=0.3),
        dict(r=4, lora_alpha=8, use_dora=True, lora_dropout=0.3),
    ),
    (
        "GPT-2",
        dict(rank=4, alpha=8, target_modules=["wte", "c_attn"]),
        dict(r=4, lora_alpha=8, target_modules=["wte", "c_attn"], fan_in_fan_out=True),
    ),
    ("Qwen2", dict(rank=4, alpha=8), dict(r=4, lora_alpha=8)),
    ("GPT-2", dict(rank=4, alpha=8), dict(r=4, lora_alpha=8, fan_in_fan_out=True)),
    ("BERT", dict(rank=4, alpha=8), dict(r=4, lora_alpha=8)),
    ("T5", dict(rank=4, alpha=8), dict(r=4, lora_alpha=8)),
]


def parity_rows():
    "(what, largest differences) of LoRA with every option against peft."
    from ftbook.models.load import load_model

    rows = []
    for name, ours, theirs in cases:
        what = ", ".join(f"{k} {v}" for k, v in ours.items() if k != "rank")
        rows.append((f"{name}: {what}", compare(LoRA(**ours).apply(make(name)), peft_twin(make(name), **theirs))))
    for init in ("pissa", "olora"):
        rows.append(
            (
                f"Llama: {init}",
                compare(
                    LoRA(rank=4, alpha=8, init=init).apply(make("Llama")),
                    peft_twin(make("Llama"), r=4, lora_alpha=8, init_lora_weights=init),
                    std=0.01,
                    begun=True,
                ),
            )
        )
    rows.append(
        (
            "Llama: LoRA+, lr_ratio 16",
            compare(
                LoRA(rank=4, alpha=8, lr_ratio=16).apply(make("Llama")),
                peft_twin(make("Llama"), r=4, lora_alpha=8),
                lr_ratio=16,
            ),
        )
    )
    a, b = (load_model("smollm2-135m", dtype="float32", device="cpu", attention="eager")[0] for _ in range(2))
    rows.append(
        (
            "smollm2-135m: alpha 32, rank 16",
            compare(LoRA().apply(a), peft_twin(b, r=16, lora_alpha=32), steps=0, std=0.01),
        )
    )
    return rows


@pytest.mark.parametrize("name", small_models)
def test_does_nothing_then_counts_like_peft(name):
    model, data = make(name).requires_grad_(False), batch()  # freezing alone changes how torch rounds T5's products
    want = model(**data).logits
    assert torch.equal(LoRA(rank=4).apply(model)(**data).logits, want)
    s = trainable_summary(model)
    assert peft_twin(make(name), r=4).get_nb_trainable_parameters() == (s.trained, s.total)
    assert s.trained == sum(4 * (sum(o.lora_A.shape[1:]) + len(o.lora_B)) for o in parts_of(model).values())


@pytest.mark.parametrize("name, ours, theirs", cases)
def test_adapters_cross_the_border(name, ours, theirs, tmp_path):
    import peft

    a, b = LoRA(**ours).apply(make(name)).eval(), peft_twin(make(name), **theirs).eval()
    in_step(a, b)
    save_adapter(a, tmp_path / "ours")
    b.save_pretrained(tmp_path / "theirs")
    there, here = (
        peft.PeftModel.from_pretrained(make(name), tmp_path / "ours").eval(),
        load_adapter(make(name), tmp_path / "theirs").eval(),
    )
    want = b(**batch()).logits
    assert gap([(there(**batch()).logits, want), (here(**batch()).logits, want), (a(**batch()).logits, want)]) < 1e-5
    mine, his = (json.loads((tmp_path / o / "adapter_config.json").read_text()) for o in ("ours", "theirs"))
    same = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "fan_in_fan_out", "inference_mode")
    assert {k: mine[k] for k in same} == {k: his[k] for k in same} and set(mine) <= set(his)
    assert here.ftbook_method.scaling == a.ftbook_method.scaling


def test_weights_in_half_precision_are_read(tmp_path):
    b = peft_twin(make("Llama"), r=4).bfloat16()
    b.save_pretrained(tmp_path)
    model = load_adapter(make("Llama"), tmp_path)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "field, value",
    [
        ("bias", "all"),
        ("bias", "lora_only"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "mica"),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", ["x"]),
        ("alora_invocation_tokens", [1]),
        ("use_bdlora", {"a": 1}),
        ("ensure_weight_tying", True),
        ("loftq_config", {"bits": 4}),
        ("trainable_token_indices", [1]),
        ("use_qalora", True),
        ("a_field_of_next_year", 7),
    ],
)
def test_fields_that_would_change_the_result_are_refused(field, value, tmp_path):
    save_adapter(LoRA(rank=4).apply(make("Llama")), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ValueError, match=field):
        load_adapter(make("Llama"), tmp_path)


def test_initialisation():
    from torch.nn.init import kaiming_uniform_

    torch.manual_seed(5)
    first = LoRA(rank=4, seed=3).apply(make("Llama"))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again, other = (LoRA(rank=4, seed=s).apply(llama()) for s in (3, 4))
    pick = lambda m: torch.cat([o.lora_A.flatten() for o in parts_of(m).values()])
    assert torch.equal(pick(first), pick(again)) and not torch.equal(pick(again), pick(other))
    layer = LoRALinear(nn.Linear(400, 300), 100, 1.0)
    like = kaiming_uniform_(torch.empty(100, 400), a=math.sqrt(5))
    assert (
        (layer.lora_B == 0).all()
        and abs(layer.lora_A.std() / like.std() - 1) < 0.02
        and layer.lora_A.abs().max() <= 400**-0.5
    )


def test_own_seed_leaves_the_global_one_alone():
    model = make("Llama")
    state = torch.get_rng_state()
    LoRA(rank=4).apply(model)
    assert torch.equal(torch.get_rng_state(), state)


# Bad input


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(rank=0), "at least 1"),
        (dict(rank=-1), "at least 1"),
        (dict(rank=1.5), "whole"),
        (dict(rank=True), "rank=True"),
        (dict(rank="8"), "rank='8'"),
        (dict(alpha=0), "alpha"),
        (dict(alpha=float("nan")), "finite"),
        (dict(alpha=float("inf")), "finite"),
        (dict(dropout=1), "below 1"),
        (dict(dropout=-0.1), "at least 0"),
        (dict(dropout=float("nan")), "dropout"),
        (dict(target_modules=[]), "empty"),
        (dict(target_modules=None), "empty"),
    ],
)
def test_bad_hyperparameters(wrong, said):
    with pytest.raises(ValueError, match=said):
        LoRA(**wrong)


def test_rank_larger_than_the_layer():
    with pytest.raises(
        ValueError, match=r"rank=17 is larger than model\.layers\.0\.self_attn\.k_proj, which maps 32 numbers to 16"
    ):
        LoRA(rank=17).apply(make("Llama"))


# Whatever may happen to a family


def lively(model, **kw):
    LoRA(**{"rank": 4, "alpha": 8, **kw}).apply(model)
    torch.manual_seed(7)
    for o in parts_of(model).values():
        nn.init.normal_(o.lora_B, std=0.1)
    return model


def lonely(model):
    "The same model with every layer on its own."
    for o in parts_of(model).values():
        o.leave_()
    return model


def families(model):
    return {id(o.siblings): o.siblings for o in parts_of(model).values() if o.siblings}.values()


def at_rest(model):
    return all(o.x is None and not o.waiting for o in families(model))


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


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_like_peft(dtype, dora):
    ours, theirs = (
        LoRA(rank=4, alpha=8, use_dora=dora).apply(make("Llama")),
        peft_twin(make("Llama"), r=4, lora_alpha=8, use_dora=dora),
    )
    pairs = in_step(ours, theirs)
    for m in (ours, theirs):
        with torch.autocast("cpu", dtype):
            out = m(**batch())
        out.loss.backward()
    assert at_rest(ours)
    with torch.autocast("cpu", dtype):
        assert ours.model.layers[0].self_attn.q_proj(torch.randn(2, 32)).dtype == dtype
    assert all(p.grad.dtype == torch.float32 for p, _ in pairs.values())
    assert max(float((p.grad - q.grad).norm() / q.grad.norm()) for p, q in pairs.values()) < 0.05


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_bfloat16_base_keeps_float32_parameters(dora):
    exact, model = lively(make("Llama"), use_dora=dora), lively(make("Llama").bfloat16(), use_dora=dora)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    for m in (exact, model):
        m(**batch()).loss.backward()
    ours, want = grads(model), grads(exact)
    assert {g.dtype for g in ours.values()} == {torch.float32}
    assert max(float((ours[n] - g).norm() / g.norm()) for n, g in want.items()) < 0.1


def test_nothing_is_kept_alive():
    model = lively(make("Llama"))
    out = model(**batch())  # no backward follows
    nodes = [weakref.ref(o) for o in (out.logits,)]
    attention = model.model.layers[0].self_attn
    seen = []
    hook = attention.register_forward_pre_hook(
        lambda m, a, k: seen.append(weakref.ref(k["hidden_states"])), with_kwargs=True
    )
    del out
    model(**batch())
    gc.collect()
    assert at_rest(model) and all(r() is None for r in nodes + seen)


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


def experts(name):
    "A small mixture of experts, its experts in one parameter."
    from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

    small = dict(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts_per_tok=2,
    )
    own = (
        Qwen3MoeConfig(**small, intermediate_size=64, moe_intermediate_size=48, num_experts=8)
        if name == "Qwen3-MoE"
        else MixtralConfig(**small, intermediate_size=96, num_local_experts=4)
    )
    return seeded(lambda: AutoModelForCausalLM.from_config(own))


def left_out(method, model):
    "What is said of matrices that `method` does not reach."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        method.apply(model)
    return [str(w.message) for w in said if "in no linear layer" in str(w.message)]


@pytest.mark.parametrize("name, router", [("Qwen3-MoE", 8), ("Mixtral", 4)])
def test_fused_experts_are_not_left_out_silently(name, router):
    model = experts(name)
    fused = sum(p.numel() for p in model.parameters() if p.dim() == 3)
    linear = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    n_router = 2 * router * 32
    (said,) = left_out(LoRA(rank=2), model)
    assert (
        f"reaches {linear / (linear + fused + n_router):.0%} of the numbers" in said
        and f"{fused + n_router:,} numbers ({(fused + n_router) / (linear + fused + n_router):.0%})" in said
    )
    assert (
        f"model.layers.*.mlp.experts.gate_up_proj ({fused * 2 // 3:,}), model.layers.*.mlp.experts.down_proj "
        f"({fused // 3:,}), model.layers.*.mlp.gate.weight ({n_router:,})"
    ) in said
    assert "modules_to_save=['experts']" in said and "target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj']" in said


@pytest.mark.parametrize("name", ["Qwen3-MoE", "Mixtral"])
def test_what_the_warning_advises_ends_it_and_works(name, tmp_path):
    from transformers import AutoModelForCausalLM

    assert left_out(LoRA(rank=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]), experts(name)) == []
    model = experts(name)
    assert left_out(LoRA(rank=2, modules_to_save=["experts"]), model) == []
    ids = torch.arange(12).view(2, 6)
    model(ids, labels=ids).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if ".whole." in n}
    assert len(trained) == 4 and all(p.grad.abs().sum() > 0 for p in trained.values())
    with torch.no_grad():
        for p in trained.values():
            p.sub_(p.grad)
    save_adapter(model, tmp_path)
    with torch.no_grad():
        assert (
            torch.equal(load_adapter(experts(name), tmp_path).eval()(ids).logits, model.eval()(ids).logits)
            and gap([(experts(name).eval()(ids).logits, model(ids).logits)]) > 1e-4
        )


@pytest.mark.parametrize("name", small_models)
def test_dense_models_are_told_nothing(name):
    assert left_out(LoRA(rank=2), make(name)) == []


def test_coverage():
    from ftbook.methods.coverage import coverage
    from ftbook.methods.quant import quantize_

    model, names = make("Llama"), LoRA().targets(make("Llama"))
    whole = coverage(model, names)
    n = sum(m.weight.numel() for k, m in model.named_modules() if isinstance(m, nn.Linear) and k != "lm_head")
    assert (whole.total, whole.reached, whole.outside, whole.share) == (n, n, {}, 1)
    attention = [k for k in names if "self_attn" in k]
    assert coverage(model, attention).reached == sum(model.get_submodule(k).weight.numel() for k in attention) < n
    assert (
        coverage(quantize_(make("Llama")), names) == whole
        and coverage(make("Llama"), ["model.layers"]) == whole
        and coverage(model, ["model.layer"]).reached == 0
    )
    with pytest.raises(ValueError, match="before a method is applied"):
        coverage(LoRA().apply(model), names)


def test_meta_device_costs_nothing():
    with torch.device("meta"):
        model = llama()
    assert (
        trainable_summary(LoRA(rank=4).apply(model)).trained
        == trainable_summary(LoRA(rank=4).apply(make("Llama"))).trained
    )


# Merging


@pytest.mark.parametrize("name", small_models)
def test_merged_is_unmerged(name):
    model = lively(make(name)).eval()
    want, state = model(**batch()).logits, {k: v.clone() for k, v in model.state_dict().items()}
    merge_(model)
    assert gap([(model(**batch()).logits, want)]) < 1e-5
    unmerge_(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and torch.equal(
        model(**batch()).logits, want
    )


def test_merging_in_bfloat16_rounds_once():
    model = lively(make("Llama").bfloat16())
    layer = model.model.layers[0].mlp.up_proj
    want = (layer.base.weight.float() + layer.delta()).bfloat16()
    before = layer.base.weight.clone()
    merge_(model)
    assert torch.equal(layer.base.weight, want) and layer.base.weight.dtype == torch.bfloat16
    unmerge_(model)
    assert torch.equal(layer.base.weight, before)


# What it costs


def saved_bytes(model, x):
    seen, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t):
        s = t.untyped_storage()
        if s.data_ptr() not in own:
            seen[s.data_ptr()] = s.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(**x)
    return sum(seen.values())


@pytest.mark.parametrize("dtype, at_most", [(torch.float32, 1.0), (torch.bfloat16, 0.7)])
def test_no_more_is_saved_for_backward_than_by_peft(dtype, at_most):
    data = batch(length=128)
    for m in (ours := LoRA(rank=4).apply(make("Llama").to(dtype)), theirs := peft_twin(make("Llama").to(dtype), r=4)):
        m.enable_input_require_grads()
    assert saved_bytes(ours, data) <= at_most * saved_bytes(theirs, data)


def test_no_gradient_for_frozen_weights():
    from torch.utils.flop_counter import FlopCounterMode

    layer = LoRALinear(nn.Linear(64, 64, bias=False).requires_grad_(False), 2, 1.0)
    x = torch.randn(100, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        low_rank(x, [layer])[0].sum().backward()
    full, thin = 2 * 100 * 64 * 64, 2 * 100 * 64 * 2
    # y and dx, three products with A and three with B; the weight's gradient would be a third `full`
    assert 2 * full < counter.get_total_flops() <= 2 * full + 6 * thin


# DoRA


def test_row_norms_without_the_matrix():
    torch.manual_seed(0)
    w, a, b = torch.randn(50, 30), torch.randn(4, 30), torch.randn(50, 4)
    assert gap([(row_norms(w, w.square().sum(1), a, b, 1.7), (w + 1.7 * b @ a).norm(dim=1))]) < 1e-4
    b[0] = 0
    w[0] = 0
    assert row_norms(w, w.square().sum(1), a, b, 1.7)[0] == 0


@pytest.mark.parametrize("name", small_models)
def test_dora_merges_and_leaves(name):
    model, data = make(name).eval(), batch()
    before = {n: p.clone() for n, p in model.named_parameters()}
    LoRA(rank=4, alpha=8, use_dora=True).apply(model)
    for o in parts_of(model).values():
        nn.init.normal_(o.lora_B, std=0.1)
        o.lora_magnitude_vector.data.mul_(1.1)
    want = model(**data).logits
    assert gap([(merge_(model)(**data).logits, want)]) < 1e-4
    assert torch.equal(unmerge_(model)(**data).logits, want)
    remove_(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_changed_base_has_other_norms():
    layer = LoRALinear(nn.Linear(6, 5).requires_grad_(False), 2, 1.0, use_dora=True)
    first = layer.norms()
    with torch.no_grad():
        layer.base.weight.mul_(2)
    assert torch.allclose(layer.norms(), 2 * first)
    layer.base.weight.data = layer.base.weight.data * 2
    assert torch.allclose(layer.norms(), 4 * first)


# Where it begins


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_6"])
@pytest.mark.parametrize("name", small_models)
def test_beginning_inside_the_weights(name, init, tmp_path):
    import peft

    model, data = make(name).eval(), batch()
    want, weights = model(**data).logits, {n: p.clone() for n, p in model.named_parameters()}
    LoRA(rank=4, alpha=8, init=init).apply(model)
    assert gap([(model(**data).logits, want)]) < 1e-4  # nothing has changed,
    # and yet the weights have
    assert (
        max(
            float((p - weights[n.replace(".base.", ".")]).abs().max())
            for n, p in model.named_parameters()
            if ".base." in n
        )
        > 1e-3
    )
    for o in parts_of(model).values():
        o.lora_B.data.add_(0.05 * torch.randn_like(o.lora_B))
    moved = model(**data).logits
    assert gap([(moved, want)]) > 1e-3
    save_adapter(model, tmp_path)
    there, here = peft.PeftModel.from_pretrained(make(name), tmp_path).eval(), load_adapter(make(name), tmp_path).eval()
    assert gap([(there(**data).logits, moved), (here(**data).logits, moved)]) < 1e-4
    assert here.ftbook_method.rank == 8 and here.ftbook_method.init == "kaiming"
    remove_(model)
    assert gap((p, weights[n]) for n, p in model.named_parameters()) < 1e-5
    merged = merge_(LoRA(rank=4, alpha=8, init=init).apply(model))
    assert gap([(remove_(merged)(**data).logits, want)]) < 1e-4


@pytest.mark.parametrize("rslora", [False, True])
def test_as_plain_keeps_the_scaling(rslora):
    method = LoRA(
        rank=4, alpha=8, init="pissa", use_rslora=rslora, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}
    )
    for name in ("q_proj", "v_proj", "o_proj"):
        assert math.isclose(as_plain(method).scaling_of(name), method.scaling_of(name))
    assert as_plain(LoRA()) == LoRA()


def test_the_weights_of_a_quantised_base_are_not_touched():
    class Linear4(nn.Linear):
        pass

    with pytest.raises(ValueError, match="Linear4 does not allow"):
        LoRA(rank=2, init="pissa").apply(nn.Sequential(Linear4(6, 6)))


# Patterns, whole modules, embeddings, tied heads


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(rank_pattern={"query": 2}), "'query' matches none"),
        (dict(alpha_pattern={"x": 2}), "'x' matches none"),
        (dict(modules_to_save=["score"]), "'score' matches no module"),
        (dict(modules_to_save=["q_proj"]), "both a target and in modules_to_save"),
        (dict(layers_to_transform=[7]), "no layer is left"),
        (dict(exclude_modules=r".*"), "no layer is left"),
        (dict(target_modules=["embed_tokens"], use_dora=True), "is an embedding"),
        (dict(rank_pattern={"q_proj": 99}), "rank=99 is larger"),
        (dict(modules_to_save=["model", "norm"]), "a module that holds it"),
    ],
)
def test_what_does_not_fit_changes_nothing(wrong, said):
    model = make("Llama")
    before, kinds = {n: p.clone() for n, p in model.named_parameters()}, [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=said):
        LoRA(**{"rank": 2, **wrong}).apply(model)
    assert [type(m) for m in model.modules()] == kinds and all(
        torch.equal(p, before[n]) and p.requires_grad for n, p in model.named_parameters()
    )


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(init="best"), "init='best'"),
        (dict(init="pissa_niter_0"), "init="),
        (dict(rank_pattern={"q": 0}), "rank_pattern"),
        (dict(alpha_pattern={"q": -1}), "alpha_pattern"),
        (dict(lr_ratio=0), "lr_ratio"),
        (dict(use_dora=True, lora_bias=True), "do not go together"),
    ],
)
def test_more_bad_hyperparameters(wrong, said):
    with pytest.raises(ValueError, match=said):
        LoRA(**wrong)


def test_a_pattern_in_a_file_may_name_what_is_not_there(tmp_path):
    import peft

    b = peft_twin(make("Llama"), r=4, rank_pattern={"q_proj": 2, "fc9": 3}, target_modules=["q_proj", "v_proj", "fc9"])
    b.save_pretrained(tmp_path)
    model = load_adapter(make("Llama"), tmp_path)
    assert (
        model.ftbook_method.rank_pattern == {"q_proj": 2}
        and gap([(model(**batch()).logits, b(**batch()).logits)]) < 1e-6
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "given",
    [
        dict(modules_to_save=["lm_head"]),
        dict(modules_to_save=["embed_tokens", "lm_head"]),
        dict(target_modules=["embed_tokens", "q_proj"]),
        dict(target_modules=["lm_head", "v_proj"]),
    ],
    ids=str,
)
def test_heads_and_embeddings_saved_reloaded_merged(given, tied, tmp_path):
    "PAINS 13: new tokens and tied heads give the same logits after every way."
    torch.manual_seed(0)
    model = llama(tied=tied).eval()
    state = copy.deepcopy(model.state_dict())
    LoRA(**{"rank": 4, **given}).apply(model)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.05 * torch.randn_like(p))
    want = model(**batch()).logits
    save_adapter(model, tmp_path)

    def fresh():
        new = llama(tied=tied).eval()
        new.load_state_dict(state)
        return new

    import peft

    assert (
        gap(
            [
                (m(**batch()).logits, want)
                for m in (load_adapter(fresh(), tmp_path), peft.PeftModel.from_pretrained(fresh(), tmp_path))
            ]
        )
        < 1e-5
    )
    shares = tied and any(k in str(given) for k in ("lm_head", "embed_tokens"))
    if shares:
        with pytest.raises(ValueError, match="tied to another module"):
            merge_(model)
    plain = remove_(merge_(model, keep=False, untie=True))
    assert gap([(plain(**batch()).logits, want)]) < 1e-4
    plain.save_pretrained(tmp_path / "merged")
    again = type(plain).from_pretrained(tmp_path / "merged").eval()
    assert gap([(again(**batch()).logits, want)]) < 1e-4


def test_an_embedding_that_grew_comes_with_the_file(tmp_path):
    import peft

    torch.manual_seed(3)
    grown = make("Llama")
    grown.resize_token_embeddings(vocab + 4)
    b = peft.get_peft_model(grown, peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]))
    for n, p in b.named_parameters():
        if "lora" in n:
            p.data.add_(0.1 * torch.randn_like(p))
    b.save_pretrained(tmp_path)
    here = make("Llama")
    with pytest.raises(ValueError, match=r"\(64, 32\) in the file and \(60, 32\) in the model"):
        load_adapter(here, tmp_path)
    here.resize_token_embeddings(vocab + 4)
    before = here.model.embed_tokens.weight.clone()
    load_adapter(here, tmp_path)
    here.lm_head.load_state_dict(grown.lm_head.state_dict())
    assert gap([(here(**batch()).logits, b(**batch()).logits)]) < 1e-5
    assert torch.equal(remove_(here).model.embed_tokens.weight, before)


# LoRA+


def test_finetune_reads_the_ratio():
    from ftbook.data.examples import Example
    from ftbook.training.settings import Settings
    from ftbook.training.loop import Loop

    model = LoRA(rank=4, lr_ratio=8).apply(make("Llama"))
    groups = Loop(model, [Example([1, 2, 3], [False, True, True])], Settings()).optimizer.param_groups
    assert sorted((g["lr_scale"], len(g["params"])) for g in groups) == [(1.0, 14), (8.0, 14)]
    loop = Loop(
        model, [Example([1, 2, 3], [False, True, True])], Settings(lr=1e-3, warmup=0, schedule="constant"), packs=False
    )
    loop.take_step()
    assert sorted(g["lr"] for g in loop.optimizer.param_groups) == [1e-3, 8e-3]


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


def test_what_cannot_share_a_model(tmp_path):
    model = LoRA(rank=2).apply(make("Llama"))
    add_adapter_(model, "second", LoRA(rank=2))
    assert adapter_names(model) == ["default", "second"]
    with pytest.raises(ValueError, match="name of another"):
        add_adapter_(model, "default", LoRA())
    with pytest.raises(FileNotFoundError):
        add_adapter_(model, "third", tmp_path)
    assert adapter_names(model) == ["default", "second"] and model.ftbook_active == "second"
    add_adapter_(model, "dora", LoRA(rank=2, use_dora=True))
    with pytest.raises(ValueError, match="do not add up"):
        use_adapter_(model, {"dora": 1.0, "second": 1.0})
    assert model.ftbook_active == "dora" and parts_of(model)
    begun = LoRA(rank=2, init="pissa").apply(make("Llama"))
    with pytest.raises(ValueError, match="save it"):
        add_adapter_(begun, "x", LoRA(rank=2))
