"""What was tried against the distance of a merge to a copy, each thing alone, in turns.

The machine need not be quiet; what other processes took is noted.
"""

from merges import METHODS, ROUNDS, UNEQUAL, turn
from sides.merging import TRIED

KEY = 'method', 'round'
PACKAGES = 'torch', 'numpy'
SIDES = 'ours', 'unhashed', *TRIED, 'copy'


def plan(runs):
    "Every method, round by round."
    for again in range(ROUNDS):
        for method in (*METHODS, UNEQUAL):
            yield dict(method=method, round=again)


def run(job):
    "Every side once."
    return turn(job['method'], SIDES)
