"""Seconds of the second step of every rung of the ladder of memory, without the profiler, the rungs taking turns."""

import contextlib, gc

from instruments import hush
from studies.memory import DEFAULT, ladder, ready

KEY = 'ladder', 'turn'
PACKAGES = 'torch', 'transformers', 'bitsandbytes'
ALONE = 0.05
PER_PROCESS = 0
TURNS, TORCH_THREADS = 3, 2


def plan(runs):
    "Turn by turn."
    for turn in range(TURNS):
        for rung in ladder():
            yield dict(ladder=rung['ladder'], turn=turn)


def run(job):
    "Two steps; the time of the second."
    import torch

    hush()
    torch.set_num_threads(TORCH_THREADS)
    configuration = next(DEFAULT | c for c in ladder() if c['ladder'] == job['ladder'])
    gc.collect()
    with contextlib.ExitStack() as stack:
        two_steps, losses, _ = ready(configuration, stack)
        two_steps()
    return dict(threads=TORCH_THREADS, seconds=round(losses[-1][1], 3))
