"""Losses of `finetune` on a GPU with and without its own operators, in every precision; and activations that are offloaded."""

import random

import cuda
from cuda import MANY, random_model
from instruments import hush
from studies.memory import MIXED

KEY = 'dtype', 'precision', 'checkpointing', 'fast', 'max_tokens'
PACKAGES = cuda.PACKAGES
PER_PROCESS, THREADS = MANY, 1
STEPS = 8
SETTINGS = (
    ('float32', 'bf16', False, 8192),
    ('float32', None, False, 8192),
    ('float32', None, False, 800),
    ('float32', 'fp16', False, 8192),
    ('float32', 'bf16', True, 8192),
)


def plan(runs):
    "Every setting with and without our operators; the last run, without a setting, offloads."
    for dtype, precision, checkpointing, max_tokens in SETTINGS:
        for fast in (True, False):
            yield dict(zip(KEY, (dtype, precision, checkpointing, fast, max_tokens)))
    yield {}


def run(job):
    "Losses and seconds of some steps; or the peak with and without offloading."
    name = cuda.device()
    hush()
    return (trained(**job) if job else dict(offload=offloaded())) | dict(device=name)


def rows():
    "64 rows of 40 to 400 random tokens."
    from ftbook.data.examples import Example

    rng, found = random.Random(0), []
    for i in range(64):
        ids = [rng.randrange(3, 40_000) for _ in range(rng.randrange(40, 400))]
        found.append(Example(ids, [False] + [True] * (len(ids) - 1), index=i))
    return found


def trained(dtype, precision, checkpointing, fast, max_tokens, on='cuda', steps=STEPS):
    "Steps of `finetune`."
    from ftbook.training.tune import finetune

    h = finetune(
        random_model('SmolLM2-135M', dtype, on),
        rows(),
        max_steps=steps,
        batch_size=8,
        max_tokens=max_tokens,
        lr=3e-4,
        **MIXED[precision],
        gradient_checkpointing=checkpointing,
        fast=fast,
        progress=False,
    ).history
    return dict(losses=[round(x['loss'], 5) for x in h], seconds=[round(x['seconds'], 4) for x in h])


def offloaded():
    "Peak bytes of a forward pass, as it is and with its activations in the processor's memory."
    import torch
    from ftbook.memory.measure import measure_peak
    from ftbook.memory.tricks import offload_activations

    model = random_model('SmolLM2-135M', 'float32')

    def forward():
        return model(torch.zeros(1, 1024, dtype=torch.int64, device='cuda'), use_cache=False).logits

    kept = measure_peak(forward, 'cuda').peak
    with offload_activations():
        return dict(kept=kept, offloaded=measure_peak(forward, 'cuda').peak)
