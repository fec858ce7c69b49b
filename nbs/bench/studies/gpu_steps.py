"""Forward and backward with LoRA, DoRA and QLoRA on a GPU: PEFT, our layers, and what `finetune` runs; on bitsandbytes too.

The variants are those of `lora_step` and `qlora`, in models with the shapes of public ones and random weights.
"""

import contextlib, gc

import cuda
from cuda import MANY, freed, random_model, settled
from instruments import hush
from studies import lora_step, qlora

KEY = 'kind', 'model', 'dtype', 'tokens'
PACKAGES = cuda.PACKAGES
PER_PROCESS, THREADS = MANY, 1
TURNS = 8
STEPS = (
    ('lora', 'SmolLM2-135M', 'float32', 512),
    ('lora', 'SmolLM2-135M', 'bfloat16', 2048),
    ('qlora', 'SmolLM2-135M', 'bfloat16', 2048),
    ('lora', 'Llama-3.2-1B', 'bfloat16', 2048),
    ('qlora', 'Llama-3.2-1B', 'bfloat16', 2048),
    ('dora', 'Llama-3.2-1B', 'bfloat16', 2048),
)


def plan(runs):
    "Small models first."
    for values in STEPS:
        yield dict(zip(KEY, values))


def run(job):
    "Seconds of every variant in every turn, its peak over what is there before, and differences from PEFT."
    name = cuda.device()
    hush()
    try:
        return compared(**job) | dict(device=name)
    finally:
        freed()


def compared(kind, model, dtype, tokens, on='cuda', turns=TURNS):
    "One kind of step: a first step that is compared, a second that warms up, then the variants in turns."
    import torch

    def base(dtype):
        return random_model(model, dtype, on)

    def ids(n):
        return torch.randint(3, 30_000, (1, n), generator=torch.Generator().manual_seed(0)).to(on)

    with contextlib.ExitStack() as stack:
        if kind == 'qlora':
            runs = qlora.variants(dtype, tokens, stack, base, ids)
        else:
            runs = lora_step.variants(dtype, tokens, kind == 'dora', stack, base, ids)
        same, scale = differences({k: timed(*v, on) for k, v in runs.items()})
        for v in runs.values():
            timed(*v, on)
        found = [{k: timed(*v, on) for k, v in runs.items()} for _ in range(turns)]
    return dict(
        seconds={k: [round(f[k][0], 5) for f in found] for k in runs},
        above={k: found[-1][k][3] for k in runs},
        same=same,
        largest_gradient=scale,
    )


def differences(first):
    "(variant -> differences from PEFT, the largest gradient); a frozen model has none to compare."
    peft = first['peft']
    same = {
        k: dict(loss=abs(f[1] - peft[1]), gradient=lora_step.gap(f[2], peft[2]))
        for k, f in first.items()
        if f[2].keys() == peft[2].keys() and k != 'peft'
    }
    return same, max(float(g.abs().max()) for g in peft[2].values())


def timed(model, loss, on):
    "(seconds of forward and backward, loss, gradients, the peak over what was there before)."
    import torch

    gc.collect()
    before = 0
    if on == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = settled()
    value = loss()
    value.backward()
    seconds = settled() - start
    peak = torch.cuda.max_memory_allocated() - before if on == 'cuda' else 0
    found = lora_step.gradients(model)
    model.zero_grad()
    return seconds, value.item(), found, peak
