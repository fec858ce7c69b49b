"Errors and private helpers of ftbook.show.bar_chart."

from fastcore.test import test_eq as check_eq, test_fail as check_fail
from ftbook.show.bar_chart import _spread


def test_errors_belong_to_bars():
    check_eq(_spread({'a': {'': 2.0}}, {'a': 0.5}), {('a', ''): (1.5, 2.5)})
    check_fail(lambda: _spread({'a': {'': 2.0}}, {'b': 0.5}), contains='which is no bar; there are: a')
