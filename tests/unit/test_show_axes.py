"Errors and private helpers of ftbook.show.axes."

from fastcore.test import test_close as check_close, test_eq as check_eq, test_fail as check_fail
from ftbook.show.axes import _Axis, _linear_ticks, _log_ticks


def test_linear_ticks_are_round_and_short():
    labels = lambda *a: [t for _, t in _linear_ticks(*a)]
    check_eq(labels(0, 1, 5), ['0', '0.2', '0.4', '0.6', '0.8', '1.0'])
    check_eq(labels(-3, 3, 3), ['\u22122', '0', '2'])
    check_eq(labels(0, 4.2e6, 4), ['0', '2M', '4M'])


def test_log_ticks_are_decades_or_the_powers_of_two_given():
    labels = lambda *a: [t for _, t in _log_ticks(*a)]
    check_eq(labels(-5, -2, 5, [1e-5, 3e-3]), ['1e-5', '1e-4', '0.001', '0.01'])
    check_eq(labels(0, 2, 5, [1, 4, 64]), ['1', '2', '4', '8', '16', '32', '64'])


def test_a_log_axis_puts_ten_in_the_middle_and_refuses_zero():
    axis = _Axis([1, 100], log=True, limits=None, n=5)
    check_fail(lambda: _Axis([1], True, (0, 1), 5), contains='cannot go from 0 to 1')
    check_close([axis(10), (axis(1) + axis(100)) / 2], [0.5, 0.5])
