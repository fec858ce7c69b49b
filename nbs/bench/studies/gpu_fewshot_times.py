"""Seconds of SetFit and of the classifier of this book on a GPU, in turns, alone on the device, eight rows a class.

`tried` names a setting of ours: 'upper' is the upper half of the encoder and the similarity loss. Seed 200 warms up and is not counted.
"""

import cuda
from cuda import MANY, settled
from instruments import hush
from studies.gpu_fewshot import right, setfit

KEY = 'way', 'task', 'shots', 'seed'
PACKAGES = cuda.PACKAGES
PER_PROCESS, THREADS = MANY, 1
WARM = 'news', 200
TASKS, SEEDS, SHOTS = ('news', 'movie', 'tweets'), (201, 202, 203), 8


def plan(runs):
    "Ours, then SetFit, on the same rows."
    for task, seed in [WARM, *((t, s) for s in SEEDS for t in TASKS)]:
        for way in ('tried', 'setfit'):
            yield dict(way=way, task=task, shots=SHOTS, seed=seed)


def run(job):
    "Accuracy and seconds of one classifier."
    name = cuda.device()
    hush()
    way = dict(tried=ours, setfit=setfit)[job['way']]
    return way(job['task'], job['shots'], job['seed']) | dict(alone=True, device=name)


def ours(task, shots, seed, on='cuda'):
    "The classifier of this book, tuned in any case."
    from ftbook.fewshot.classifier import FewShotClassifier
    from ftbook.fewshot.tuning import Tuning
    from studies.fewshot import columns
    from tasks import split_few

    train, test = split_few(task, shots, seed)
    test_texts, truth = columns(test)
    model = FewShotClassifier(device=on, tuning=Tuning(seed=seed))
    start = settled()
    model.fit(*columns(train), check=False)
    seconds = settled() - start
    return dict(
        tried='upper',
        accuracy=right(model.predict(test_texts), truth),
        seconds=round(seconds, 3),
        test_rows=len(truth),
    )
