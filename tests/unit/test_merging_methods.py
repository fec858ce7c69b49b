"TIES: where its two readings agree."

import numpy as np
import pytest

from ftbook.merging.methods import merge_agreeing, trim_

d = np.float32([[0.9, -0.1, 0.5, -0.6], [0.7, 0.2, -0.8, 0.0]])
zero = np.zeros(4, np.float32)


def test_with_equal_weights_both_readings_are_one():
    trimmed = trim_(d.copy(), [0.5, 0.5])
    by_votes, by_paper = (merge_agreeing(zero, trimmed, [1, 1], weigh_first=o) for o in (True, False))
    assert by_votes == pytest.approx(by_paper)


def test_with_unequal_weights_they_differ():
    trimmed = trim_(d.copy(), [0.5, 0.5])
    by_votes, by_paper = (merge_agreeing(zero, trimmed, [3, 1], weigh_first=o) for o in (True, False))
    assert by_votes != pytest.approx(by_paper)
