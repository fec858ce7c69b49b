"Errors and private helpers of ftbook.merging.between."

from fastcore.test import test_fail as check_fail
from ftbook.merging.between import between, between_shares


def test_between_1():
    slope = {(a, b): 2 * a - 3 * b for a in (0, 0.5, 1) for b in (0, 0.5, 1)}
    check_fail(
        lambda: between({p: v for p, v in slope.items() if p != (1, 1)}, (0.9, 0.9)), contains='(1, 1) was not measured'
    )


def test_between_shares_1():
    tilted = {(a, b, 3 - a - b): 2 * a - 5 * b for a in range(4) for b in range(4 - a)}
    check_fail(
        lambda: between_shares({k: v for k, v in tilted.items() if k != (0, 3, 0)}, (0, 1, 0)),
        contains='(0, 3, 0) was not measured',
    )
