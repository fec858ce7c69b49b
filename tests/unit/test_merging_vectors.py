"Edges of the arithmetic with task vectors."

import numpy as np
import pytest

from ftbook.merging.vectors import conflicts, slerp_weights, soup


def test_the_mean_of_two_directions_is_shorter():
    assert np.linalg.norm(soup(np.eye(2, dtype=np.float32), [1, 1])) == pytest.approx(0.5**0.5)


def test_between_parallel_models_the_way_is_a_line():
    assert slerp_weights(1.0, 0.25) == (0.75, 0.25)


def test_vectors_that_move_nothing_have_no_conflicts():
    assert conflicts(np.zeros((2, 3))) == 0.0
