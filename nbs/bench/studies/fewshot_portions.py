"""A step of the few-label classifier, its batch read in portions of several sizes.

A part is 'batch', 8 rows a class, or 'fold', half of them, as the check has them. `used_N` is the share of the tokens that are no
padding.
"""

import statistics, time

from studies.fewshot import columns
from tasks import FEW_TASKS, split_few

KEY = 'task', 'part'
PACKAGES = ('torch',)
PER_PROCESS, THREADS = 12, 1
SIZES, ROUNDS = (4, 8, 16, 40), 7


def plan(runs):
    "Both parts of each task, in one process."
    for task in FEW_TASKS:
        for part in ('batch', 'fold'):
            yield dict(task=task, part=part)


def run(job):
    "Milliseconds of loss and gradient: medians of runs that take turns, in processor time."
    from ftbook.fewshot.encoder import _portion, load_body, read_states
    from ftbook.fewshot.pairs import Decks
    from ftbook.fewshot.rows import make_shots
    from ftbook.fewshot.tuning import trained_, Tuning

    body, tuning = load_body('minilm-l6', 'cpu'), Tuning()
    start = tuning.start(body)
    trained_(body, tuning)
    shots = make_shots(*columns(split_few(job['task'], 8, 0)[0]))
    states = read_states(body, body.ids(shots.texts)[0], start)
    batch = list(range(0, len(states), 1 if job['part'] == 'batch' else 2))
    batch = [batch[i] for i in Decks(shots.targets[batch], 0).batch(tuning.batch_size)]
    rows, targets = [states[i] for i in batch], shots.targets[batch]
    times = {s: [] for s in SIZES}
    for _ in range(ROUNDS):
        for s in SIZES:
            times[s].append(once(body, rows, targets, tuning, s))
    found = dict(sentences=len(batch), taken=_portion(len(batch), 'cpu'))
    for s in SIZES:
        found |= {f'ms_{s}': round(1000 * statistics.median(times[s]), 3), f'used_{s}': round(used(rows, s), 3)}
    return found


def once(body, rows, targets, tuning, size):
    "Seconds of a step in portions of this size."
    from ftbook.fewshot import contrast

    usual = contrast._portion
    contrast._portion = lambda n, device: size  # the name that `batch_loss` looks up
    try:
        start = time.process_time()
        contrast.batch_loss(body, rows, targets, tuning).backward()
        return time.process_time() - start
    finally:
        contrast._portion = usual


def used(rows, size):
    "Share of the tokens that are no padding."
    from ftbook.fewshot.encoder import _by_length

    lengths = [len(r) for r in rows]
    portions = _by_length([range(n) for n in lengths], size)
    return sum(lengths) / sum(len(p) * max(lengths[i] for i in p) for p in portions)
