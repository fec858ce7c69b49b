"LoRA against peft: counts, files, gradients, memory, DoRA, heads and embeddings."

import copy, json

import pytest, torch
from torch import nn

from ftbook.methods.lora_method import LoRA
from ftbook.methods.lora_variants import param_groups
from ftbook.methods.parts import parts_of
from ftbook.methods.files import load_adapter, save_adapter
from ftbook.methods.fold import merge_, remove_
from ftbook.methods.summary import trainable_summary
from cases.lora import at_rest, batch, gap, grads, lively, llama, make, peft_twin, small_models, vocab


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


# Whatever may happen to a family


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


# What it costs


def saved_bytes(model, x):
    seen, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t):
        s = t.untyped_storage()
        if s.data_ptr() not in own:
            seen[s.data_ptr()] = s.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(**x)
    return sum(seen.values())


@pytest.mark.parametrize("dtype, at_most", [(torch.float32, 1.0), (torch.bfloat16, 0.7)])
def test_no_more_is_saved_for_backward_than_by_peft(dtype, at_most):
    data = batch(length=128)
    for m in (ours := LoRA(rank=4).apply(make("Llama").to(dtype)), theirs := peft_twin(make("Llama").to(dtype), r=4)):
        m.enable_input_require_grads()
    assert saved_bytes(ours, data) <= at_most * saved_bytes(theirs, data)


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


# Patterns, whole modules, embeddings, tied heads


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
    model = llama(tie_word_embeddings=tied).eval()
    state = copy.deepcopy(model.state_dict())
    LoRA(**{"rank": 4, **given}).apply(model)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.05 * torch.randn_like(p))
    want = model(**batch()).logits
    save_adapter(model, tmp_path)

    def fresh():
        new = llama(tie_word_embeddings=tied).eval()
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
