"Learning curves of scores and targets that cannot be."

import numpy as np
import pytest

from ftbook.quality.checks import check_size
from ftbook.quality.curve import data_needed, fit_curve
from ftbook.quality.learning import learning_curve
from cases.curves import runs


@pytest.mark.parametrize(
    'wrong, said',
    [
        ([], 'three sizes'),
        ([dict(n=8, score=0.5)] * 9, 'three sizes'),
        ([dict(n=n, score=0.5) for n in (1, 2, 3)], 'two runs'),
        ([dict(n=0, score=0.5)], 'n is 1 or more'),
        ([dict(n=5, score=87.0)], 'between 0 and 1'),
        ([dict(n=5, score=float('nan'))], 'between 0 and 1'),
    ],
)
def test_what_is_no_curve(wrong, said):
    with pytest.raises(ValueError, match=said):
        fit_curve(wrong)


@pytest.mark.parametrize('target', [0, 1, 90, -1])
def test_what_is_no_target(target):
    with pytest.raises(ValueError, match='between 0 and 1'):
        data_needed(fit_curve(runs((0.1, 1.0, 0.5), 0.01)), target)


def test_too_few_rows_for_a_curve():
    x = np.zeros((20, 2))
    with pytest.raises(ValueError, match='20 rows of 2 classes'):
        learning_curve(x, ['a', 'b'] * 10, progress=False)
    with pytest.raises(ValueError, match='1 class'):
        learning_curve(np.zeros((90, 2)), ['a'] * 90, progress=False)
    with pytest.raises(ValueError, match='not finite'):
        learning_curve(np.full((90, 2), np.nan), ['a', 'b'] * 45, progress=False)


def test_nothing_is_said_of_nothing():
    assert check_size([]) == []
