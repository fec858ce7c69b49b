"Errors and private helpers of ftbook.show.series."

from fastcore.test import test_eq as check_eq, test_fail as check_fail
import math

from ftbook.show.series import _band_path, _check_log, _gather, _line_path, _series, _thin


def test_a_series_needs_as_many_ys_as_xs_and_one_finite_value():
    check_eq(_series('line', 'a', ([1, 2], [3, None]), ('xs', 'ys'))[0], (1.0, 3.0))
    check_fail(lambda: _series('line', 'a', ([1, 2], [3]), ('xs', 'ys')), contains="line 'a': 2 xs but 1 ys")
    check_fail(lambda: _series('line', 'a', ([1], [math.nan]), ('xs', 'ys')), contains='none of its 1 values is finite')


def test_nothing_to_plot_and_zero_on_a_log_axis_are_refused():
    check_fail(lambda: _gather(lines=None, points=None, bands=None), contains='nothing to plot')
    data = _gather(lines={'loss': ([0, 1], [2, 3])}, points=None, bands=None)
    check_fail(lambda: _check_log(data, 'log_x', True), contains="log_x needs values above 0; line 'loss' has 0")


def test_points_on_a_straight_line_are_left_out():
    run = [(x, x / 2) for x in range(1000)] + [(1000, 0)]
    check_eq(_thin(run), [(0, 0), (999, 499.5), (1000, 0)])


def test_a_line_breaks_at_nan_and_a_band_closes():
    check_eq(_line_path([(0, 0), (1, 1), (2, math.nan), (3, 3)], float, float), 'M0 0 1 1M3 3h.1')
    check_eq(_band_path([(0, 0, 1), (9, 0, 1)], float, float), 'M0 1 9 1 9 0 0 0z')
