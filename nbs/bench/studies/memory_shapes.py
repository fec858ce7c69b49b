"""Plans of public shapes, and of the ladder on longer rows, for the explorers of the lesson on memory: nothing is loaded."""

import itertools, time

from instruments import hush
from studies.memory import DEFAULT, ladder, method_of, optimizer_of, planned

KEY = 'model', 'method', 'seq_len', 'batch_size', 'gradient_checkpointing', 'ladder', 'tokens'
PACKAGES = 'torch', 'transformers', 'bitsandbytes'
PER_PROCESS = 0
MODELS = 'SmolLM2-135M', 'Llama-3.2-1B', 'Llama-3.2-3B', 'LLaMA-7B', 'LLaMA-13B', 'Llama-3.1-70B'
WAYS = 'full', 'LoRA', 'QLoRA'
# width, layers, heads, hidden units of those that have no name in the library
FIRST_LLAMA = {'LLaMA-7B': (4096, 32, 32, 11_008), 'LLaMA-13B': (5120, 40, 40, 13_824)}
LADDER_TOKENS = 2048


def plan(runs):
    """Rows that train on one GPU: batches of several sizes of one model, single rows of all models; then the ladder. What
    both lists have is planned twice, and shows how far the seconds are to be trusted."""
    batches = itertools.product(['LLaMA-7B'], WAYS, (512, 2048), (1, 4, 16), (True, False))
    single = itertools.product(MODELS, WAYS, (512, 2048), (1,), (True, False))
    for values in (*batches, *single):
        yield dict(zip(KEY, values))
    for rung in ladder():
        yield dict(ladder=rung['ladder'], tokens=LADDER_TOKENS)


def run(job):
    "One plan."
    hush()
    return plan_rung(job) if 'ladder' in job else plan_shape(**job)


def plan_rung(job):
    "A rung of the ladder on longer rows."
    rung = next(c for c in ladder() if c['ladder'] == job['ladder'])
    c = DEFAULT | rung | dict(tokens=job['tokens'])
    p = planned(c, *method_of(c['method']), optimizer_of(c['optimizer'], c['in_backward'])[0])
    return dict(items=p.groups(), when=p.when)


def plan_shape(model, method, seq_len, batch_size, gradient_checkpointing):
    "A public shape on a GPU."
    from ftbook.memory.plan import plan
    from ftbook.methods.lora_method import LoRA
    from ftbook.methods.quant import quantize_

    start = time.perf_counter()
    p = plan(
        first_llama(*FIRST_LLAMA[model]) if model in FIRST_LLAMA else model,
        None if method == 'full' else LoRA(),
        quantize=quantize_ if method == 'QLoRA' else None,
        dtype='bfloat16',
        seq_len=seq_len,
        batch_size=batch_size,
        gradient_checkpointing=gradient_checkpointing,
        device='cuda',
    )
    return dict(items=p.groups(), when=p.when, seconds=round(time.perf_counter() - start, 2))


def first_llama(width, layers, heads, hidden):
    "The configuration of one of the first LLaMA models."
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=hidden,
        vocab_size=32_000,
    )
