"""Merges against mergekit, whole processes against the clock.

'theirs' is mergekit, 'ours' ftbook, 'unhashed' ours without the SHA-256 of every file, 'copy' a process that reads
the same inputs and writes as many bytes. All four take turns.
"""

from merges import METHODS, ROUNDS, turn

KEY = 'method', 'round'
PACKAGES = 'torch', 'numpy'
ALONE = 0.05
SIDES = 'theirs', 'ours', 'unhashed', 'copy'


def plan(runs):
    "Every method, round by round."
    for again in range(ROUNDS):
        for method in METHODS:
            yield dict(method=method, round=again)


def run(job):
    "Every side once."
    return turn(job['method'], SIDES)
