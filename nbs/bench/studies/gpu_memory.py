"""The plan of memory beside the peak of PyTorch's allocator on a GPU, from SmolLM2-135M to an 8B model.

Several configurations share a process. After the first of them cuBLAS keeps its workspace, so `left` says what the one before left.
"""

import gc

import cuda
from cuda import MANY, freed, random_model
from instruments import hush
from studies.memory import DEFAULT, MIXED, by_finetune, method_of, optimizer_of

KEY = tuple(DEFAULT)
PACKAGES = cuda.PACKAGES
PER_PROCESS, THREADS = MANY, 1


def plan(runs):
    "Small models first."
    for configuration in configurations():
        yield DEFAULT | configuration


def run(job):
    "What the plan says, and the allocator's peak in two steps of `finetune`."
    name = cuda.device()
    hush()
    try:
        return measured(job) | dict(device=name)
    finally:
        freed()


def measured(c):
    "One configuration."
    import torch
    from ftbook.memory.plan import CONTEXT, plan

    method, quantize = method_of(c['method'])
    told, real = optimizer_of(c['optimizer'])
    p = plan(
        c['model'],
        method,
        quantize=quantize,
        dtype=c['dtype'],
        seq_len=c['tokens'],
        batch_size=c['rows'],
        optimizer=told,
        **MIXED[c['precision']],
        gradient_checkpointing=c['checkpointing'],
        device='cuda',
    )
    left = torch.cuda.memory_allocated()  # what the configuration before left behind in this process
    model = random_model(c['model'], c['dtype'])
    if quantize:
        model = quantize(model) or model
    if method:
        model = method.apply(model)
    two_steps, losses = by_finetune(model, c, real)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    two_steps()
    return dict(
        planned=p.peak,
        context=CONTEXT,
        measured=torch.cuda.max_memory_allocated() - left,
        reserved=torch.cuda.max_memory_reserved(),
        before=before - left,
        left=left,
        items=p.groups(),
        losses=[round(l, 4) for l, _ in losses],
    )


def configurations():
    "What is measured: each differs from `DEFAULT` in what it names."
    small, l1, l3, l8 = 'SmolLM2-135M', 'Llama-3.2-1B', 'Llama-3.2-3B', 'Llama-3.1-8B'
    lora = dict(method='lora', dtype='bfloat16')
    yield from (
        dict(model=small, tokens=n, **c)
        for n in (512, 2048)
        for c in (
            {},
            dict(checkpointing=True),
            dict(precision='bf16'),
            dict(precision='fp16'),
            lora,
            dict(lora, checkpointing=True),
        )
    )
    yield from (
        dict(model=small, tokens=512, rows=4, optimizer=o) for o in ('sgd', 'adafactor', 'adamw8bit', 'bitsandbytes')
    )
    yield from (
        dict(model=small, tokens=512, method=m, dtype='bfloat16')
        for m in ('qlora', 'bottleneck', 'prompt', 'prefix', 'ia3', 'bitfit', 'dora')
    )
    yield from (
        dict(model=l1, tokens=n, **c)
        for n in (512, 2048)
        for c in (
            dict(checkpointing=True),
            dict(precision='bf16', checkpointing=True),
            dict(precision='bf16', optimizer='adafactor'),
            lora,
            dict(lora, method='qlora', checkpointing=True),
        )
    )
    yield from (
        dict(model=l3, tokens=2048, checkpointing=True, **c)
        for c in (dict(precision='bf16', optimizer='adamw8bit'), lora, dict(lora, method='qlora'))
    )
    yield from (
        dict(model=l8, tokens=n, rows=r, checkpointing=c, **lora)
        for n, r, c in ((512, 1, False), (2048, 1, True), (2048, 4, True), (8192, 1, True))
    )
    yield from (dict(model=l8, tokens=n, checkpointing=True, **dict(lora, method='qlora')) for n in (512, 2048))
