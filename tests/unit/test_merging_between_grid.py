"Values between measured places: on a grid and in a triangle of shares."

import itertools

import pytest
from hypothesis import given, settings, strategies as st

from ftbook.merging.between import between, between_shares

weight = st.floats(0, 1)


@settings(max_examples=100, deadline=None)
@given(weight, weight, st.lists(st.floats(0, 1), min_size=9, max_size=9))
def test_a_value_between_neighbours(a, b, values):
    "It stands between the values of its neighbours, whose shares add up to one and whose mean place is the point."
    grid = dict(zip(itertools.product((0, 0.5, 1), repeat=2), values))
    value, shares = between(grid, (a, b))
    near = [grid[p] for p in shares]
    assert (
        len(shares) <= 3 and min(near) - 1e-9 <= value <= max(near) + 1e-9 and sum(shares.values()) == pytest.approx(1)
    )
    for i, x in enumerate((a, b)):
        assert sum(s * p[i] for p, s in shares.items()) == pytest.approx(x, abs=1e-6)


def test_a_neighbour_that_lacks_is_named():
    grid = {p: 0.0 for p in itertools.product((0, 1), repeat=2) if p != (1, 1)}
    assert between(grid, (0.25, 0.5))[1] == {(0, 0): 0.25, (1, 0): 0.25, (0, 1): 0.5}
    with pytest.raises(ValueError, match=r'\(1, 1\) was not measured'):
        between(grid, (0.75, 0.5))
    with pytest.raises(ValueError, match='outside'):
        between(grid, (0, 1.1))
    with pytest.raises(ValueError, match='outside'):
        between({}, (0, 0))


proportion = st.integers(0, 12)


@settings(max_examples=200, deadline=None)
@given(st.tuples(proportion, proportion, proportion).filter(any), st.integers(1, 5), st.data())
def test_a_value_between_shares(at, steps, data):
    "It stands between the values of its neighbours, whose shares add up to one and whose mean place is the point."
    places = [(a, b, steps - a - b) for a in range(steps + 1) for b in range(steps + 1 - a)]
    grid = dict(zip(places, data.draw(st.lists(st.floats(0, 1), min_size=len(places), max_size=len(places)))))
    value, shares = between_shares(grid, at)
    near = [grid[p] for p in shares]
    assert (
        1 <= len(shares) <= 3
        and min(near) - 1e-9 <= value <= max(near) + 1e-9
        and sum(shares.values()) == pytest.approx(1)
    )
    for i, x in enumerate(at):
        assert sum(s * p[i] for p, s in shares.items()) == pytest.approx(steps * x / sum(at), abs=1e-6)
    assert max(abs(p[i] - q[i]) for p in shares for q in shares for i in range(3)) <= 1


@pytest.mark.parametrize('at', [(0, 0, 0), (-1, 1, 1)])
def test_no_shares(at):
    with pytest.raises(ValueError, match='has no shares'):
        between_shares({(1, 0, 0): 1.0}, at)
