"A search on a problem whose answer is known."

import numpy as np
import pytest

from ftbook.merging.search import search
from ftbook.merging.vectors import task_arithmetic


@pytest.fixture(scope="module")
def found():
    "Two models, each right in one half of the columns: the sum of both task vectors is right in all."
    base, goal = np.random.default_rng(0).standard_normal((2, 8), np.float32)
    halves = np.stack([(goal - base) * half for half in (np.arange(8) < 4, np.arange(8) >= 4)])
    score = lambda w: -float(np.square(task_arithmetic(base, halves, w) - goal).mean())
    return search(score, [0.5, 0.5], high=1.5)


def test_it_finds_the_sum(found):
    assert found.weights == pytest.approx([1, 1], abs=0.1)


def test_it_keeps_what_it_tried_within_the_trials(found):
    assert found.score > found.start and 1 < len(found.tried) <= 30
    assert found.score == max(s for _, s in found.tried) and found.tried[0] == ([0.5, 0.5], found.start)
