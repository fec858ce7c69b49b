"""SetFit on a GPU, on the rows of `fewshot`, where a processor takes too long for ten seeds.

Every run takes some seconds and little of the device, so several processes may share it:

    for i in 0 1 2 3; do timeout 500 python -m nbs.bench run gpu_fewshot --share $i/4 & done; wait

The rows are fetched from packages once; `cuda.py` says how a machine without a network gets them. setfit 1.2 has to be installed beside
ftbook there, as both take turns in one process.
"""

import cuda
from cuda import MANY
from ftbook.problem import Problem
from instruments import hush
from tasks import FEW_TASKS

KEY = 'way', 'task', 'shots', 'seed'
PACKAGES = cuda.PACKAGES
PER_PROCESS, THREADS = MANY, 1
SEEDS = 10
# rows a class -> tasks, what a processor takes long for first; at 64 rows, those of no more than 1,000 steps
TASKS = {64: ('movie', 'products', 'tweets'), 16: ('groups', 'r8', 'news'), 8: FEW_TASKS}


def plan(runs):
    for shots, tasks in TASKS.items():
        for seed in range(SEEDS):
            for task in tasks:
                yield dict(way='setfit', task=task, shots=shots, seed=seed)


def run(job):
    "Accuracy and seconds of one classifier."
    name = cuda.device()
    hush()
    return setfit(job['task'], job['shots'], job['seed']) | dict(device=name)


def setfit(task, shots, seed, on='cuda'):
    "SetFit with its defaults."
    from studies.fewshot import SETFIT_RUN, columns, setfit_steps, task_of
    from tasks import split_few

    import torch

    torch.set_num_threads(THREADS)
    train, test = split_few(task, shots, seed)
    test_texts, truth = columns(test)
    program = {}
    exec(SETFIT_RUN, program)
    try:
        found = program['run'](task_of(*columns(train), test_texts, seed, 0) | dict(device=on))
    except ModuleNotFoundError as e:
        raise Problem(f'{e.name} is not installed here', 'pip install setfit==1.2.0', key='setfit') from e
    return dict(
        accuracy=right(found['said'], truth),
        seconds=round(found['seconds'], 3),
        test_rows=len(truth),
        steps=setfit_steps(task, shots),
    )


def right(said, truth):
    "The share of right answers."
    return round(sum(a == b for a, b in zip(said, truth)) / len(truth), 4)
