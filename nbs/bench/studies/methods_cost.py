"""What every method costs: a step, memory while training, and a forward pass, in place and merged."""

import statistics, time

from instruments import Memory, fresh
from studies.methods import BATCH, VARIANTS, apply_, rows_of

KEY = ('variant',)
PACKAGES = 'torch', 'transformers', 'peft'
ALONE = 0.05
THREADS = 2
ROUNDS = 3


def plan(runs):
    "Each variant in a process of its own, round by round."
    for _ in range(ROUNDS):
        for variant in VARIANTS:
            yield dict(variant=variant)


def run(job):
    "Step time, memory above the weights while training, and inference."
    import torch
    from ftbook.data.encoding import encode
    from ftbook.training.tune import finetune

    variant = job['variant']
    train, *_ = rows_of('movie', 0)
    model, tokenizer, precision = fresh(VARIANTS[variant] is None)
    apply_(variant, model, tokenizer, 'movie', 0)
    examples, memory = encode([r for r, _ in train[:64]], tokenizer), Memory()
    mixed = dict(precision=precision, mixed=precision is not None)
    trained = finetune(model, examples, lr=1e-5, batch_size=BATCH, epochs=1, progress=False, **mixed)
    peak = memory.stop()
    ids = torch.tensor([examples[0].input_ids[:64]] * 8)
    model.eval()
    found = dict(
        threads=torch.get_num_threads(),
        step_seconds=statistics.median(h['seconds'] for h in trained.history[2:]),
        peak_bytes=peak,
        forward_seconds=forward(model, ids),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )
    return found if VARIANTS[variant] is None else found | dict(merged_seconds=merged(model, ids))


def forward(model, ids):
    "Seconds of a forward pass."
    import torch

    times = []
    with torch.no_grad():
        for _ in range(9):
            start = time.perf_counter()
            model(ids)
            times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def merged(model, ids):
    "The same of the merged model, or None where a method cannot be merged."
    from ftbook.methods.fold import merge_
    from ftbook.problem import Problem

    try:
        return forward(model, ids) if merge_(model, keep=False) else None
    except Problem:
        return None
