"Plans against the allocator, accounts that add up, and tricks that change no result."

import contextlib, json, sys, threading, time

import pytest, torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from book import nbs
from ftbook.results import read_results
from ftbook import ghost
from ftbook.data import attention as data_attention
from ftbook.memory import account as memory_account, configs as memory_configs
from ftbook.memory import advice as memory_advice
from ftbook.memory import measure as memory_measure
from ftbook.memory import plan as memory_plan
from ftbook.memory import step as memory_step
from ftbook.memory import trace as memory_trace
from ftbook.methods import nf4 as methods_nf4
from ftbook.methods import quant as methods_quant
from ftbook.methods import quant_layer as methods_quant_layer
from ftbook.training import batches as training_batches
from ftbook.training import fast as training_fast
from ftbook.training import objective as training_objective
from ftbook.training import optimizer_names as training_optimizer_names
from ftbook.training import processes as training_processes
from ftbook.methods.lora_method import LoRA
from ftbook.methods.bottleneck_method import Bottleneck
from ftbook.methods.prompt_tuning import PromptTuning
from ftbook.memory.plan import GIB, plan
from ftbook.training.optimizer_names import in_backward
from ftbook.training.optimizers import LossScaler
from ftbook.memory.step import Setting
from ftbook.memory.advice import advise, largest, plan_report
from ftbook.memory.tricks import checkpoint_, tiled_attention, uncheckpoint_
from ftbook.memory.measure import measure_peak
from cases.memory import llama


def real(config, s, method=None):
    "Bytes at the peak of two real steps, and of nothing else."
    others = memory_measure.live_bytes()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    if method:
        method.apply(model)
    model.config.use_cache = False
    with contextlib.ExitStack() as stack:
        packs = stack.enter_context(training_batches.isolated(model, s.fast))
        if s.gradient_checkpointing:
            model.gradient_checkpointing_enable(dict(use_reentrant=False))
        objective, batch = (
            training_objective.Objective(model),
            memory_step.full_batch(model, packs, s.seq_len, s.batch_size),
        )
        optimizer = training_optimizer_names.as_optimizer(s.optimizer)(
            training_optimizer_names.parameter_groups([p for p in model.parameters() if p.requires_grad])
        )
        return (
            measure_peak(lambda: memory_step.run_steps(objective, batch, optimizer, s.autocast, s.pieces)).peak
            - others
        )


def head_scratch(n, vocabulary=2000, width=64):
    """The most that the CPU's bfloat16 kernels allocate beside their results in the head's three products: no plan can know
    it, and a model this small shows it."""
    h, w, logits = (torch.randn(*size).bfloat16() for size in ((n, width), (vocabulary, width), (n, vocabulary)))
    products = [
        lambda: torch.mm(h, w.t(), out=logits),
        lambda: torch.mm(logits, w, out=h),
        lambda: w.addmm_(logits.t(), h),
    ]
    return max(m.peak - m.before for m in map(measure_peak, products))


@pytest.mark.parametrize(
    "how",
    [
        {},
        dict(gradient_checkpointing=True),
        dict(optimizer="adafactor"),
        dict(optimizer="adamw8bit"),
        dict(precision="bfloat16", mixed=True),
        dict(fast=False),
        dict(pieces=2, batch_size=2),
        dict(optimizer=in_backward()),
    ],
    ids=["plain", "checkpointing", "adafactor", "8-bit", "mixed", "slow", "pieces", "in backward"],
)
def test_the_plan_is_the_allocators(how):
    s = dict(seq_len=128) | how
    beside = head_scratch(127) if "precision" in how else 0
    assert plan(llama(), **s).peak + beside == pytest.approx(real(llama(), Setting(**s)), rel=0.001 if beside else 0.01)


@pytest.mark.parametrize(
    "method", [LoRA(), Bottleneck(), PromptTuning(num_virtual_tokens=8)], ids=lambda m: type(m).__name__
)
def test_methods_are_planned(method):
    assert plan(llama(), method, seq_len=128).peak == pytest.approx(
        real(llama(), Setting(seq_len=128), method), rel=0.01
    )


def qwen_experts(layers=4, **more):
    return Qwen3MoeConfig(
        vocab_size=2000,
        hidden_size=64,
        intermediate_size=192,
        moe_intermediate_size=48,
        num_experts=8,
        num_experts_per_tok=2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        **more,
    )


def mixtral(layers=4, **more):
    return MixtralConfig(
        vocab_size=2000,
        hidden_size=64,
        intermediate_size=96,
        num_local_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        **more,
    )


experts = pytest.mark.parametrize("config", [qwen_experts, mixtral], ids=["Qwen3-MoE", "Mixtral"])
attention = ["q_proj", "k_proj", "v_proj", "o_proj"]


@experts
@pytest.mark.parametrize("method", [None, LoRA(target_modules=attention)], ids=["full", "LoRA"])
@pytest.mark.parametrize(
    "how",
    [{}, dict(gradient_checkpointing=True), dict(precision="bfloat16", mixed=True)],
    ids=["plain", "checkpointing", "mixed"],
)
def test_experts_are_planned_as_the_allocator_has_them(config, method, how):
    beside = head_scratch(127) if "precision" in how else 0
    s = dict(seq_len=128) | how
    assert plan(config(), method, **s).peak + beside == pytest.approx(
        real(config(), Setting(**s), method), rel=0.001 if beside else 0.01
    )


@experts
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_are_planned_in_both_precisions(config, device, dtype):
    width, n = (
        dict(float32=4, bfloat16=2)[dtype],
        sum(p.numel() for p in AutoModelForCausalLM.from_config(config()).parameters()),
    )
    # so short that the peak has every gradient
    p = plan(config(), optimizer="sgd", seq_len=4, dtype=dtype, device=device)
    assert p.items[f"weights, {dtype}"] == p.items["gradients"] == width * n
    frozen = plan(config(), LoRA(target_modules=attention), seq_len=64, dtype=dtype, device=device)
    assert frozen.items[f"weights, {dtype}"] == width * n


def narrow(*shape):
    "A matrix or a stack whose last dimension is no multiple of 16 bytes, while its rows in memory are."
    return torch.randn(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)


grouped = {
    "rows, each by the matrix of its group": (torch.randn(16, 32), narrow(3, 32, 10), [4, 8, 16]),
    "groups of the inner dimension": (torch.randn(24, 16), narrow(16, 10), [4, 8, 16]),
    "a matrix for each group of columns": (torch.randn(3, 24, 32), narrow(32, 10), [4, 8, 10]),
    "matrix by matrix": (torch.randn(3, 24, 32), narrow(3, 32, 10), None),
}


@pytest.mark.parametrize("name", grouped)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_grouped_product_is_like_the_real_one(name, dtype):
    a, b, ends = grouped[name]
    a, b, offsets = a.to(dtype), b.to(dtype), ends and torch.tensor(ends, dtype=torch.int32)
    want, found = torch._grouped_mm(a, b, offs=offsets), memory_trace._grouped_product(a, b, offsets)

    def form(t):
        return t.shape, t.stride(), t.dtype, t.untyped_storage().nbytes()

    assert form(found) == form(want)


def test_layers_with_and_without_experts_are_not_drawn_as_a_line():
    "Dense layers at the bottom leave the line straight; those in between are run as they are."
    for config, line in (
        (qwen_experts(9, mlp_only_layers=[0, 2]), 9),
        (qwen_experts(9, mlp_only_layers=[6]), 0),
        (qwen_experts(9, decoder_sparse_step=2), 0),
    ):
        n = sum(p.numel() for p in memory_configs.build_ghost(config).parameters())
        assert memory_configs._depth(config) == line and plan(config, seq_len=16).items["weights, float32"] == 4 * n


def test_a_plan_by_a_line_warns_in_the_numbers_of_the_whole_model():
    from ftbook.methods.quant import quantize_

    n = 12 * 8 * 3 * 48 * 64
    with pytest.warns(UserWarning) as said:
        plan(qwen_experts(12), LoRA(), quantize=quantize_, seq_len=16)
    told = [str(w.message) for w in said if "in no linear layer" in str(w.message)]
    assert len(told) == 2 and all(f"experts.gate_up_proj ({n * 2 // 3:,})" in t for t in told)


@pytest.mark.parametrize(
    "how", [{}, dict(gradient_checkpointing=True), dict(optimizer="sgd", batch_size=3), dict(method=LoRA())], ids=str
)
def test_a_line_through_two_depths_is_exact(how):
    whole = plan(AutoModelForCausalLM.from_config(llama(12)), seq_len=64, **how)
    deep = plan(llama(12), seq_len=64, **how)
    between = "step 2: backward, middle layers"
    assert deep.parts == {k: v for k, v in whole.parts.items() if "middle" not in k} and deep.items == whole.items
    assert whole.parts[between] <= max(
        whole.parts[between.replace("middle", "upper")], whole.parts[between.replace("middle", "lower")]
    )


def test_the_account_adds_up():
    p = plan(llama(tie_word_embeddings=True), seq_len=64)
    n = sum(q.numel() for q in AutoModelForCausalLM.from_config(llama(tie_word_embeddings=True)).parameters())
    assert p.items["weights, float32"] == 4 * n and 8 * n <= p.items["optimizer states"] < 8 * n + 1000
    assert p.peak == sum(p.items.values()) == max(v for k, v in p.parts.items() if k != "evaluation")


def test_nothing_is_left_behind():
    model = AutoModelForCausalLM.from_config(llama())
    before = (
        {n: p.clone() for n, p in model.named_parameters()},
        model.config._attn_implementation,
        training_objective.has_linear_head,
        training_fast._swap,
    )
    plan(model, LoRA(), seq_len=64)
    assert not hasattr(model, "ftbook_method") and all(
        torch.equal(p, before[0][n]) for n, p in model.named_parameters()
    )
    assert (model.config._attn_implementation, training_objective.has_linear_head, training_fast._swap) == before[1:]
    assert training_objective.has_linear_head(model)


def named_things():
    "What every module of the package has, by name."
    return {
        (module, name): thing
        for module, loaded in list(sys.modules.items())
        if module.startswith("ftbook.")
        for name, thing in list(vars(loaded).items())
    }


def test_a_plan_patches_no_module_and_only_its_own_thread_is_told():
    "Kernels ask `ghost`. The optimizer is made in the middle of a plan, and looks around."
    seen = {}

    def look(groups):
        seen.update(during=named_things(), here=ghost.traced())
        other = threading.Thread(target=lambda: seen.update(there=ghost.traced()))
        other.start()
        other.join()
        return torch.optim.SGD(groups)

    plan(llama(), seq_len=16, optimizer="sgd")  # imports all that a plan needs
    before = named_things()
    plan(llama(), seq_len=16, optimizer=look)
    assert isinstance(seen["here"], memory_trace.Tracker) and seen["there"] is None and ghost.traced() is None
    assert not [k for k, v in before.items() if seen["during"][k] is not v]
    assert not [k for k, v in named_things().items() if before.get(k) is not v]


def test_a_model_that_another_thread_runs_is_none_of_the_plans():
    model, done, runs = AutoModelForCausalLM.from_config(llama()), threading.Event(), []

    def busy():
        while not done.is_set():
            model(torch.arange(8)[None], use_cache=False)
            runs.append(1)

    def start(groups):
        other.start()
        while not runs:  # it runs now
            time.sleep(0.01)
        return torch.optim.SGD(groups)

    alone, other = plan(llama(), seq_len=64, optimizer="sgd"), threading.Thread(target=busy)
    try:
        beside = plan(llama(), seq_len=64, optimizer=start)
    finally:
        done.set()
        other.join()
    assert beside.items == alone.items and beside.parts == alone.parts


def test_sharding_follows_the_rule():
    config = dict(model=llama(), seq_len=4, optimizer="sgd")  # so short that the peak has every gradient
    alone = plan(**config).items
    on = {k: plan(**config, sharding=k, n_devices=4).items for k in training_processes.DIVIDED}

    def quarter(k):
        return -(-alone[k] // 4)

    assert (
        on["zero2"]["gradients"] == on["zero3"]["gradients"] == quarter("gradients")
        and on["zero1"]["gradients"] == alone["gradients"]
    )
    assert on["fsdp2"]["weights, float32"] == quarter("weights, float32") and on["fsdp2"]["gathered layers"] > 0
    assert plan(**config, sharding="fsdp", n_devices=4).items == on["fsdp2"]
    assert (
        on["ddp"]["gradient buckets"] == alone["gradients"]
        and on["ddp"]["weights, float32"] == alone["weights, float32"]
    )
    assert plan(llama(), seq_len=4, sharding="zero1", n_devices=4).items["optimizer states"] == -(
        -plan(llama(), seq_len=4).items["optimizer states"] // 4
    )


def test_a_quantised_model_is_planned_and_nothing_fake_stays():
    p = plan(llama(), LoRA(), quantize=methods_quant.quantize_, seq_len=64)

    def build():
        torch.manual_seed(0)
        model = methods_quant.quantize_(AutoModelForCausalLM.from_config(llama()))
        return LoRA().apply(model)

    n = sum(m.codes.nbytes for m in build().modules() if isinstance(m, methods_quant_layer.QuantLinear))
    assert p.items["weights, quantised"] == n and p.items["quantisation constants"] > 0
    assert type(methods_nf4.dynamic_code()) is torch.Tensor and ghost._running.get() is None
    whole = plan(llama(), LoRA(), quantize=methods_quant.quantize_, seq_len=64, sharding="fsdp2", n_devices=4)
    assert whole.items["weights, quantised"] == n  # buffers are not divided


def test_unpacking_is_followed_once_and_noted_again():
    """A plan that notes the lives of an unpacking again is the plan that follows every one of them, and pieces are
    those of the device."""

    def lives(f, n):
        with memory_account._fake(), ghost._following(memory_trace.Tracker()) as t, t:
            for _ in range(n):
                f()
        return [(b.n_bytes, b.born, b.died) for b in sorted(t.blocks, key=lambda b: b.born)]

    q = methods_nf4.quantize_tensor(torch.randn(256, 1024))

    def unpack():
        q.dequantize()

    def follow():
        methods_nf4.Quantized.dequantize.__wrapped__(q)

    assert lives(unpack, 3) == lives(follow, 3)
    m = measure_peak(unpack)
    assert sum(n for n, born, died in lives(follow, 1) if died is None) == 0 and m.peak > m.before + 4 * 256 * 1024


ON_GPU = [
    r for r in read_results(nbs / "bench" / "results" / "gpu_memory.jsonl")["runs"] if r["tokens"] != 8192
]


@pytest.mark.parametrize(
    "r",
    [r for r in ON_GPU if r["method"] in ("full", "lora", "prefix")][::3],
    ids=lambda r: f"{r['model']}-{r['method']}-{r['tokens']}-{r['precision']}-{r['optimizer']}",
)
def test_plan_is_what_a_gpu_measured(r):
    "Runs of bench/gpu, planned again by today's code."
    from ftbook.methods.prefix_tuning import PrefixTuning

    method = dict(full=None, lora=LoRA(), prefix=PrefixTuning(num_virtual_tokens=20))[r["method"]]
    mixed = {"bf16": "bfloat16", "fp16": "float16"}.get(r["precision"])  # as the records name it
    p = plan(
        r["model"],
        method,
        dtype=r["dtype"],
        seq_len=r["tokens"],
        batch_size=r["rows"],
        optimizer=r["optimizer"],
        precision=mixed,
        mixed=mixed is not None,
        gradient_checkpointing=r["checkpointing"],
        device="cuda",
    )
    assert abs((p.peak - memory_plan.CONTEXT) / (r["measured"] + min(r["left"], memory_plan.WORKSPACE)) - 1) < 0.03


def test_heads_that_cannot_share_keys_are_planned_with_their_own(monkeypatch):
    "In float32 a GPU's kernels want a key for each head: the plan holds the copies, and never the scores."

    def peak(**more):
        return plan(
            llama(hidden_size=128, num_attention_heads=8, num_key_value_heads=1), seq_len=512, device="cuda", **more
        ).peak

    copied, scores = peak(), peak(attention="eager")
    monkeypatch.setattr(data_attention, "_takes_flash", lambda query, mask: True)
    copies = 2 * 4 * 512 * 128 * 4  # keys and values of four layers, for each of the heads
    assert copied - peak() > copies / 2 and copied < scores - 3 * 8 * 512 * 512 * 4


def test_seventy_billion_quickly():
    start = time.process_time()
    p = plan("Llama-3.1-70B", LoRA(), seq_len=512, device="cuda", gradient_checkpointing=True)
    assert time.process_time() - start < 10 and 130 < p.items["weights, bfloat16"] / GIB < 133 and not p.fits(80)


def test_seventy_billion_in_four_bits_quickly():
    import resource
    from ftbook.methods.quant import quantize_

    start, held = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    p = plan("Llama-3.1-70B", LoRA(), quantize=quantize_, seq_len=512, device="cuda", gradient_checkpointing=True)
    # the processor's seconds: a busy machine would prove nothing
    assert time.process_time() - start < 10 and p.fits(48) and not p.fits(40)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held < 2**31 / (1 if sys.platform == "darwin" else 1024)


def test_what_fits_by_search_is_what_the_plan_says():
    rows = memory_advice.largest_batch(llama(), LoRA(), memory_gib=0.02, seq_len=64)
    assert (
        rows > 0
        and plan(llama(), LoRA(), batch_size=rows, seq_len=64).fits(0.02)
        and not plan(llama(), LoRA(), batch_size=rows + 1, seq_len=64).fits(0.02)
    )
    tokens = memory_advice.longest_sequence(llama(), LoRA(), memory_gib=0.02, step=32)
    assert (
        tokens > 0
        and plan(llama(), LoRA(), seq_len=tokens).fits(0.02)
        and not plan(llama(), LoRA(), seq_len=tokens + 32).fits(0.02)
    )


def test_the_first_way_that_fits_is_chosen():
    ways = dict(full={}, LoRA=dict(method=LoRA()))
    held = {way: plan(llama(), seq_len=64, **how).peak / GIB for way, how in ways.items()}

    def chosen(gpu):
        return [r["way"] for r in memory_advice.which_method(llama(), ways, memory_gib=gpu, seq_len=64) if r["chosen"]]

    assert (
        chosen(1.01 * held["full"]) == ["full"]
        and chosen(1.01 * held["LoRA"]) == ["LoRA"]
        and chosen(0.5 * held["LoRA"]) == []
    )


def test_largest():
    for peak, limit, want in ((lambda n: n * n, 10_000, 100), (lambda n: 3 * n + 7, 1000, 331), (lambda n: n, 0.5, 0)):
        assert largest(peak, limit) == want
    assert largest(lambda n: n, 1e12, most=64) == 64


def test_advice_ends_with_what_fits():
    found = advise("Llama-3.2-1B", memory_gib=8, seq_len=256, device="cuda", offered=dict(method=LoRA()))
    assert (
        not found[0]["fits"]
        and found[-1]["fits"]
        and found[0]["change"] == "as asked"
        and found[-1]["change"] == "train an adapter"
    )
    assert all(b["GiB"] < a["GiB"] for a, b in zip(found, found[1:]))
    text, svg = plan_report("Llama-3.2-1B", memory_gib=16, seq_len=256, device="cuda", offered=dict(method=LoRA()))
    assert "does not fit in 16 GiB" in text and svg.lstrip().startswith("<")


@pytest.mark.parametrize("n, size", [(1, 4), (7, 4), (64, 16), (65, 16)])
def test_tiles_equal_sdpa(n, size):
    q, k, v = (torch.randn(2, 2, n, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    ours, theirs = (
        tiled_attention(q, k, v, size),
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
    )
    assert torch.allclose(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours.sin().sum(), (q, k, v)), torch.autograd.grad(theirs.sin().sum(), (q, k, v))
    ):
        assert torch.allclose(a, b)


def test_checkpoints_come_off():
    model = AutoModelForCausalLM.from_config(llama())
    chosen = checkpoint_(model, every=2)
    assert len(chosen) == 2
    uncheckpoint_(chosen)
    assert not any("forward" in vars(m) for m in model.modules())


def test_the_scaler_skips_and_halves():
    w = nn.Parameter(torch.ones(2))
    opt, scaler = torch.optim.SGD([w], lr=1.0), LossScaler(8.0, patience=2)
    w.grad = torch.tensor([1.0, torch.inf])
    assert not scaler.step(opt) and scaler.scale == 4 and torch.equal(w, torch.ones(2))
    for _ in range(2):
        w.grad = torch.full((2,), 4.0)
        assert scaler.step(opt)
    assert scaler.scale == 8 and torch.equal(w, -torch.ones(2))
