"Training: packs, architectures, attention, processes, and what must be given back."

import copy, gc, json, os, random, signal, subprocess, sys, textwrap
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from book import root
from ftbook.training import attention as training_attention
from ftbook.training import batches as training_batches
from ftbook.data.layouts import Layout, layout_of
from ftbook.data.isolate import isolate_
from ftbook.data.packs import pack, pad
from ftbook.training.loop import Loop
from ftbook.training.settings import Settings
from ftbook.training.objective import Objective
from ftbook.training.checkpoints import checkpoints
from ftbook.training.chunked import chunked_loss
from ftbook.training.evaluate import evaluate
from ftbook.training.tune import finetune
from ftbook.training.batches import isolated
from ftbook.training.attention import like_lengths
from cases.train import example, rows, rows_few, tiny, trained, V


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def off(a, b):
    return ((a - b).norm() / b.norm()).item()


# --- the same numbers, whichever way ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more", [dict(max_tokens=1), dict(max_tokens=60), dict(gradient_checkpointing=True), dict(fast=False)], ids=str
)
@pytest.mark.parametrize("opening", [0, 12])
def test_the_way_does_not_matter(more, opening):
    a, b = tiny(), tiny()
    runs = [
        finetune(m, rows(opening=opening), lr=1e-3, batch_size=6, progress=False, **o) for m, o in ((a, {}), (b, more))
    ]
    assert [h["loss"] for h in runs[1].history] == pytest.approx([h["loss"] for h in runs[0].history], abs=1e-5)
    assert (trained(a) - trained(b)).abs().max() < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_is_not_undone(checkpointing):
    "What is kept to make the gated product again is not kept where whole layers are made again."
    model = tiny(intermediate_size=72)
    with isolated(model, fast=True):
        if checkpointing:
            model.activation_checkpointing_enable(dict(use_reentrant=False))
        loss = Objective(model.train())(pack(rows(4))[0])
        gc.collect()
        held = [
            t
            for t in gc.get_objects()
            if type(t) is torch.Tensor
            and t.dim() == 3
            and t.shape[-1] == 72
            and t.is_floating_point()
            and not t.requires_grad
        ]
        assert len(held) == (0 if checkpointing else 4)  # gate and up, in two layers
        loss.backward()


def test_a_model_that_takes_no_packs_gets_padded_batches(monkeypatch):
    a, b = tiny(), tiny()
    monkeypatch.setattr(b, "_supports_sdpa", False, raising=False)
    with isolated(b) as packs:
        assert not packs
    runs = [
        finetune(m, rows(opening=9), lr=1e-3, batch_size=6, eval_examples=rows(4, seed=2), progress=False)
        for m in (a, b)
    ]
    for key in ("loss", "eval_loss"):
        for x, y in zip(*(r.history for r in runs)):
            assert (x[key] is None and y[key] is None) or x[key] == pytest.approx(y[key], abs=1e-5)
    assert (trained(a) - trained(b)).abs().max() < 1e-5


def test_a_head_that_does_more():
    model = isolate_(tiny())
    model.lm_head.register_forward_hook(lambda m, x, y: 3 * torch.tanh(y / 3))
    objective, few = Objective(model), rows(5)
    assert not objective.linear
    batch = pad(few, 0)
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    assert off(gradient(model, objective(pack(few)[0])), gradient(model, want)) < 1e-5


# Models in which tokens meet elsewhere than in attention

BASE = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
WIDE = BASE | dict(intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
STATE = dict(
    mamba_d_state=8,
    mamba_d_conv=4,
    mamba_expand=2,
    mamba_n_heads=4,
    mamba_d_head=16,
    mamba_n_groups=1,
    mamba_chunk_size=8,
)
DELTA = dict(
    head_dim=8,
    layer_types=["linear_attention", "full_attention"],
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2)
MIXED = {
    "lfm2": WIDE | dict(layer_types=["conv", "full_attention"], block_ff_dim=48),
    "falcon_h1": WIDE | STATE | dict(mamba_d_ssm=64, head_dim=8),
    "qwen3_next": WIDE | DELTA | EXPERTS | dict(moe_intermediate_size=16, shared_expert_intermediate_size=16),
    "qwen3_5_text": WIDE | DELTA,
    "granitemoehybrid": WIDE
    | STATE
    | dict(layer_types=["mamba", "attention"], num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=48),
    "jamba": WIDE
    | EXPERTS
    | dict(
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_dt_rank=4,
    ),
    "bamba": WIDE | STATE | dict(attn_layer_indices=[1]),
    "zamba2": WIDE
    | dict(
        mamba_d_state=8,
        mamba_d_conv=4,
        mamba_expand=2,
        n_mamba_heads=4,
        mamba_headdim=16,
        mamba_ngroups=1,
        chunk_size=8,
        layers_block_type=["mamba", "hybrid"],
        num_mem_blocks=1,
        num_key_value_heads=4,
        attention_hidden_size=64,
        attention_head_dim=16,
        adapter_rank=4,
    ),
    "recurrent_gemma": WIDE
    | dict(
        lru_width=32,
        attention_window_size=16,
        conv1d_width=4,
        block_types=["recurrent", "attention"],
        head_dim=8,
        num_key_value_heads=1,
    ),
    "mamba2": BASE | dict(num_heads=4, head_dim=16, state_size=8, n_groups=1, expand=2, conv_kernel=4, chunk_size=8),
}
ATTENTION_ONLY = {"llama": WIDE, "qwen3_moe": WIDE | EXPERTS | dict(head_dim=8, moe_intermediate_size=16)}
RAISE_IN_A_PACK = "qwen3_next", "qwen3_5_text", "mamba2"


def mixed(kind):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(MIXED | ATTENTION_ONLY)[kind])).float()


class Keep(torch.optim.SGD):
    "An optimizer that keeps the gradients it is given and changes nothing."

    def step(self, closure=None):
        self.kept = {
            id(p): p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None
        }


def gradient_of_run(model, examples, **more):
    "The loss and the gradient of one step of `finetune`."
    made = []

    def make(groups):
        made.append(Keep(groups, lr=1.0))
        return made[-1]

    run = finetune(
        model,
        examples,
        batch_size=len(examples),
        max_steps=1,
        optimizer=make,
        max_grad_norm=None,
        progress=False,
        **more,
    )
    assert made[0].kept
    return run.history[0]["loss"], torch.cat(
        [made[0].kept.get(id(p), torch.zeros_like(p)).flatten() for p in model.parameters()]
    )


def row_by_row(model, examples):
    "The nats of every row and the gradient of their mean, by the model's own forward of each row alone."
    model.train()
    model.zero_grad()
    n, nats = sum(e.n_targets for e in examples), []
    for e in examples:
        logits = model(torch.tensor([e.input_ids]), use_cache=False).logits[0, :-1].float()
        loss = F.cross_entropy(logits, torch.tensor(e.labels)[1:], reduction="sum")
        (loss / n).backward()
        nats.append(loss.item())
    found = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return nats, found


@pytest.mark.filterwarnings("ignore:.*rows are padded")
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("kind", [*MIXED, *ATTENTION_ONLY])
def test_every_row_learns_what_it_learns_alone(kind, fast):
    "Packed and proved not to leak, or padded: loss and gradient of `finetune` are those of one row after the other."
    model = mixed(kind)
    assert layout_of(model).way == ("packed" if kind in ATTENTION_ONLY else "right")
    nats, want = row_by_row(model, rows_few)
    loss, got = gradient_of_run(model, rows_few, fast=fast)
    assert loss == pytest.approx(sum(nats) / sum(e.n_targets for e in rows_few), rel=1e-5)
    assert off(got, want) < 1e-5
    assert evaluate(model, rows_few).nats == pytest.approx(nats, rel=1e-5)
    assert evaluate(model, rows_few, max_tokens=25).nats == pytest.approx(nats, rel=1e-5)


@pytest.mark.parametrize("kind", MIXED)
def test_without_the_trial_rows_would_read_one_another(kind, monkeypatch):
    "What the test above sees if models are packed unasked."
    monkeypatch.setattr(training_batches, "layout_of", lambda model: Layout("packed"))
    model = mixed(kind)
    want = row_by_row(model, rows_few)[1]
    if kind in RAISE_IN_A_PACK:
        with pytest.raises(ValueError, match="can't keep packed sequences apart|does not take attention functions"):
            gradient_of_run(model, rows_few)
    else:
        assert off(gradient_of_run(model, rows_few)[1], want) > 1e-4


@pytest.mark.parametrize("kind", ["lfm2", "qwen3_next"])
def test_a_run_says_that_rows_are_padded(kind):
    said = {"lfm2": "in a pack a row reads its neighbour", "qwen3_next": "a pack does not run: ValueError"}[kind]
    for act in (lambda m: evaluate(m, rows_few), lambda m: finetune(m, rows_few, progress=False)):
        model = mixed(kind)
        cache = model.config.use_cache
        with pytest.warns(UserWarning, match=f"ForCausalLM: rows are padded instead of packed, since {said}"):
            act(model)
        assert (
            model.config._attn_implementation == "sdpa"
            and model.config.use_cache is cache
            and not hasattr(model, "ftbook_rows")
        )


@pytest.mark.filterwarnings("ignore:.*rows (run one by one|are padded)")
@pytest.mark.parametrize("way, vocab_size", [("left", 98), ("alone", 99)])
def test_where_padding_is_wrong_rows_still_learn_what_they_learn_alone(way, vocab_size):
    model = tiny(vocab_size=vocab_size)
    mix = dict(
        left=lambda module, args, out: out + out[:, -1:],
        alone=lambda module, args, out: out + out.mean(1, keepdim=True),
    )[way]
    model.model.norm.register_forward_hook(mix)
    assert layout_of(model).way == way
    nats, want = row_by_row(model, rows_few)
    loss, got = gradient_of_run(model, rows_few)
    assert off(got, want) < 1e-5
    assert evaluate(model, rows_few).nats == pytest.approx(nats, rel=1e-5)


SHAPE = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
KINDS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": dict(sliding_window=7),
    "gemma": {},
    "olmo2": {},
    "smollm3": {},
    "phi3": dict(pad_token_id=0),
    "granite": {},
    "gpt_neox": dict(head_dim=None),
    "gpt2": dict(n_embd=32, n_head=4, n_layer=2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_architectures(kind):
    "Our operators, packs and shared openings against the model's own code on a padded batch."
    torch.manual_seed(0)
    given = {
        k: v
        for k, v in (SHAPE | dict(pad_token_id=0, bos_token_id=1, eos_token_id=2) | KINDS[kind]).items()
        if v is not None
    }
    if kind == "gpt2":
        given = dict(vocab_size=V, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0) | KINDS[kind]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given), attn_implementation="sdpa").float()
    few, plain = rows(5, opening=10), model.state_dict()
    batch = pad(few, 0)
    n = sum(e.n_targets for e in few)
    want = gradient(model, model(**batch).loss)
    with isolated(model, fast=True) as packs:
        assert packs
        got = gradient(model, Objective(model)(pack(few, share=True)[0]) / n)
    assert off(got, want) < 2e-5
    assert all(torch.equal(v, plain[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_rounding_in_bfloat16_is_of_the_size_of_the_models_own(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **SHAPE | KINDS[kind]), attn_implementation="sdpa"
    ).float()
    few = rows(5, opening=10)
    n = sum(e.n_targets for e in few)
    truth = gradient(model, model(**pad(few, 0)).loss)
    low = copy.deepcopy(model).bfloat16()
    theirs = gradient(low, low(**pad(few, 0)).loss).float()
    with isolated(low, fast=True):
        ours = gradient(low, Objective(low)(pack(few, share=True)[0]) / n).float()
    assert off(ours, truth) < 1.5 * off(theirs, truth)


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=8),
    st.integers(0, 20),
    st.sampled_from([(4, 2), (3, 1), (2, 2)]),
    st.integers(0, 99),
    st.sampled_from([256, 8, 1]),
)
@settings(deadline=None, max_examples=60)
def test_attention_by_groups(lengths, prefix, heads, seed, block):
    """Whatever the lengths and the blocks: our attention and its gradient against PyTorch's, example by example, in
    float64."""
    torch.manual_seed(seed)
    with mock.patch.object(training_attention, "BLOCK", block):
        _check_attention(lengths, prefix, heads)


def _check_attention(lengths, prefix, heads):
    sizes = ([prefix] if prefix else []) + lengths
    q, k, v = (
        torch.randn(1, h, sum(sizes), 4, dtype=torch.float64, requires_grad=True)
        for h in (heads[0], heads[1], heads[1])
    )

    def by_example(q, k, v):
        outs, parts = [], [t.split(sizes, 2) for t in (q, k, v)]
        for i, (a, b, c) in enumerate(zip(*parts)):
            past = prefix if prefix and i else 0
            if past:
                b, c = torch.cat([parts[1][0], b], 2), torch.cat([parts[2][0], c], 2)
            seen = torch.ones(a.shape[2], b.shape[2], dtype=torch.bool).tril(past)
            outs.append(F.scaled_dot_product_attention(a, b, c, attn_mask=seen, enable_gqa=True, scale=0.5))
        return torch.cat(outs, 2).transpose(1, 2)

    want, got = by_example(q, k, v), training_attention._Attention.apply(q, k, v, tuple(sizes), prefix, 0.5)
    assert torch.allclose(got, want, atol=1e-12)
    g = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, (q, k, v), g), torch.autograd.grad(want, (q, k, v), g)):
        assert torch.allclose(a, b, atol=1e-11)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(0, 30))
def test_groups_hold_every_token_once(lengths, prefix):
    sizes = ([prefix] if prefix else []) + lengths
    taken = torch.cat([g.take[g.real] for g in like_lengths(tuple(sizes), prefix)])
    assert sorted(taken.tolist()) == list(range(sum(sizes)))


@given(st.integers(1, 400), st.integers(1, 70), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(deadline=None, max_examples=30)
def test_chunked_loss_in_any_chunks(n, chunk, dtype):
    torch.manual_seed(n)
    h, w, y = torch.randn(n, 8, dtype=dtype), torch.randn(33, 8, dtype=dtype), torch.randint(33, (n,))
    inputs = [t.clone().requires_grad_() for t in (h, w)]
    loss = chunked_loss(*inputs, y, chunk)
    truth = [t.double().requires_grad_() for t in (h, w)]
    want = F.cross_entropy(truth[0] @ truth[1].t(), y, reduction="sum")
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert loss.item() == pytest.approx(want.item(), rel=tolerance)
    for a, b in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(want, truth)):
        assert off(a.double(), b) < tolerance


def test_logits_that_would_overflow():
    h = torch.tensor([[300.0]], requires_grad=True)
    loss = chunked_loss(h, torch.tensor([[1.0], [-1.0]]), torch.tensor([1]))
    assert loss.item() == 600 and torch.autograd.grad(loss, h)[0].item() == 2


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(1, 80))
def test_pieces_hold_every_row_once(sizes, max_tokens):
    rng, loop = random.Random(0), Loop.__new__(Loop)
    loop.settings, loop.packs, loop.shares = Settings(max_tokens=max_tokens), True, False
    batch = [example(rng, n, 0) for n in sorted(sizes)]
    pieces = loop.pieces_of(batch)
    assert [t for p in pieces for t in p.input_ids[0].tolist()] == [t for e in batch for t in e.input_ids]
    assert all(sum(p.lengths) <= max_tokens + max(sizes) for p in pieces)


# --- several processes -------------------------------------------------------------------------------------------


def pull(model, pulled):
    "Nothing, or a pull that is large beside the loss, towards the weights of the beginning."
    from ftbook.forgetting.remedies import Spring

    return Spring(model, 100.0) if pulled else None


@pytest.mark.parametrize("pulled", [False, True], ids=["loss alone", "with a regulariser"])
def test_two_processes_make_the_same_step(tmp_path, pulled):
    """Five rows to a step on two processes, in pieces of unlike size, against one process; the last step leaves one
    process without a row."""
    script = tmp_path / "two.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys; sys.path[:0] = [{str(root / "tests")!r}, {str(Path(__file__).parent)!r}]
        import torch; torch.set_num_threads(1)
        from test_training import finetune, pull, rows, tiny, trained
        model = tiny()
        run = finetune(model, rows(11), lr=1e-3, batch_size=5, max_tokens=50, out={str(tmp_path / "run")!r}, regularizer=pull(model, {pulled}), progress=False)
        from accelerate import PartialState
        if PartialState().is_main_process: torch.save([trained(model), [h["loss"] for h in run.history]], {str(tmp_path / "two.pt")!r})
    """)
    )
    env = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="true")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--master-port",
            "0",
            "--rdzv-endpoint",
            "localhost:0",
            "--rdzv-backend",
            "c10d",
            script,
        ],
        capture_output=True,
        text=True,
        env=env,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    weights, losses = torch.load(tmp_path / "two.pt", weights_only=True)
    model = tiny()
    run = finetune(model, rows(11), lr=1e-3, batch_size=5, regularizer=pull(model, pulled), progress=False)
    free = tiny()
    if pulled:
        finetune(free, rows(11), lr=1e-3, batch_size=5, progress=False)
    assert not pulled or (trained(free) - trained(model)).abs().max() > 1e-4, "the pull must be felt"
    assert losses == pytest.approx([h["loss"] for h in run.history], abs=1e-5)
    assert (weights - trained(model)).abs().max() < 1e-5
    assert len(checkpoints(tmp_path / "run" / "checkpoints")) == 1


# --- what is borrowed is given back ------------------------------------------------------------------------------


def test_everything_is_given_back():
    model = tiny().eval()
    torch.manual_seed(5)
    before = (
        model.config._attn_implementation,
        model.config.use_cache,
        signal.getsignal(signal.SIGINT),
        torch.random.get_rng_state(),
    )
    finetune(model, rows(), max_steps=2, gradient_checkpointing=True, progress=False)
    evaluate(model, rows(3))
    after = (
        model.config._attn_implementation,
        model.config.use_cache,
        signal.getsignal(signal.SIGINT),
        torch.random.get_rng_state(),
    )
    assert before[:3] == after[:3] and torch.equal(before[3], after[3])
    assert (
        not model.training and not model.is_gradient_checkpointing and all(p.grad is None for p in model.parameters())
    )
    assert not any("forward" in m.__dict__ for m in model.modules())


# --- settings, history, trackers ---------------------------------------------------------------------------------


def test_history():
    run = finetune(tiny(), rows(), batch_size=4, epochs=2, eval_examples=rows(3), eval_every=3, progress=False)
    assert [h["step"] for h in run.history] == list(range(1, 7)) and run.stopped == "finished"
    assert [h["step"] for h in run.history if h["eval_loss"] is not None] == [3, 6]
    assert run.tokens == 2 * sum(map(len, rows())) and sum(h["targets"] for h in run.history) == 2 * sum(
        e.n_targets for e in rows()
    )
    json.dumps(run.history)


def test_trackers_hear_every_step():
    from accelerate.tracking import GeneralTracker

    class Notes(GeneralTracker):
        name, requires_logging_directory, main_process_only = "notes", False, True

        def __init__(self):
            super().__init__()
            self.config, self.heard = None, []

        @property
        def tracker(self):
            return self

        def store_init_configuration(self, values):
            self.config = values

        def log(self, values, step=None, **kwargs):
            self.heard.append((step, values["loss"]))

    notes = Notes()
    run = finetune(tiny(), rows(), max_steps=3, trackers=[notes], progress=False)
    assert notes.heard == [(h["step"], h["loss"]) for h in run.history] and notes.config["batch_size"] == 8
