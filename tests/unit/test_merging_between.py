"Errors and private helpers of ftbook.merging.between."

import re

import pytest

from ftbook.merging.between import between, between_shares


def test_a_missing_neighbour_on_the_grid_is_named():
    slope = {(a, b): 2 * a - 3 * b for a in (0, 0.5, 1) for b in (0, 0.5, 1) if (a, b) != (1, 1)}
    with pytest.raises(ValueError, match=re.escape("(1, 1) was not measured")):
        between(slope, (0.9, 0.9))


def test_a_missing_neighbour_in_the_triangle_is_named():
    tilted = {(a, b, 3 - a - b): 2 * a - 5 * b for a in range(4) for b in range(4 - a) if (a, b) != (0, 3)}
    with pytest.raises(ValueError, match=re.escape("(0, 3, 0) was not measured")):
        between_shares(tilted, (0, 1, 0))
