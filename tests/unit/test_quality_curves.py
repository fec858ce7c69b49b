"Learning curves: what is fitted, how wide the band is, and what is said of a score that is out of reach."

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from ftbook.quality.curve import data_needed, fit_curve
from ftbook.quality.learning import learning_curve
from ftbook.quality.power_law import fit_power_law, power_law
from cases.curves import runs, sizes


@settings(max_examples=60, deadline=None)
@given(st.floats(0.02, 0.3), st.floats(0.2, 1), st.floats(0.2, 1.5))  # errors below .005 weigh no more than that
def test_a_law_without_noise_is_found(floor, scale, power):
    error = power_law(sizes, floor, scale, power)
    fit = fit_power_law(sizes, error[None])[0]
    assert np.abs(power_law(sizes, *fit) / error - 1).max() < 0.02  # the grid of powers is that fine
    assert np.abs(power_law(4 * sizes[-1], *fit) / power_law(4 * sizes[-1], floor, scale, power) - 1) < 0.1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=7, max_size=7))
def test_any_errors_give_a_law_that_never_rises(errors):
    floor, scale, power = fit_power_law(sizes, np.array([errors]))[0]
    assert floor >= 0 and scale >= 0 and power > 0
    assert np.isfinite([floor, scale, power]).all()


def test_the_band_holds_the_truth_nine_times_in_ten():
    law, n = (0.1, 1.0, 0.5), (32, 64, 128, 256, 512)
    bands = np.array([fit_curve(runs(law, 0.01, n, seed=s), seed=s).band(2048) for s in range(100)])
    truth = 1 - power_law(2048, *law)
    assert 0.82 <= ((bands[:, 0] < truth) & (truth < bands[:, 1])).mean() <= 0.97


def test_more_noise_makes_a_wider_band():
    width = [np.diff(fit_curve(runs((0.1, 1.0, 0.5), noise)).band(4096))[0] for noise in (0.002, 0.02)]
    assert width[1] > 3 * width[0]


def test_doubling_is_the_difference():
    curve = fit_curve(runs((0.1, 1.0, 0.5), 0.01))
    gain, low, high = curve.doubling(500)
    assert gain == pytest.approx(curve(1000) - curve(500)) and low <= gain <= high


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 0.3), st.integers(0, 9))
def test_a_higher_score_takes_more(floor, seed):
    curve = fit_curve(runs((floor, 1.0, 0.5), 0.005, seed=seed))
    needs = [data_needed(curve, t).rows for t in (0.5, 0.6, 0.7, 0.8, 0.9, 0.99)]
    assert needs == sorted(needs)
    assert all(data_needed(curve, t).low <= data_needed(curve, t).high for t in (0.6, 0.9))


def test_out_of_reach_is_said():
    needed = data_needed(fit_curve(runs((0.2, 1.0, 0.5), 0.001)), 0.9)
    assert needed.rows == np.inf and needed.reach == 0
    assert 'out of reach' in repr(needed) and 0.75 < needed.ceiling[0] <= needed.ceiling[1] < 0.85


def test_far_beyond_what_was_measured_is_said():
    needed = data_needed(fit_curve(runs((0.0, 1.0, 0.25), 0.0001)), 0.95)
    assert needed.rows > 10 * sizes[-1] and 'do not lean on it' in repr(needed)


@pytest.mark.filterwarnings("error")
def test_a_flat_curve_needs_no_rows_or_all():
    curve = fit_curve([dict(n=n, score=0.7) for n in (10, 20, 40) for _ in range(2)])
    assert data_needed(curve, 0.6).rows == 1 and data_needed(curve, 0.8).rows == np.inf
    assert curve.doubling()[0] == pytest.approx(0)


def test_a_probe_learns_what_can_be_learnt():
    rng = np.random.default_rng(0)
    y = rng.integers(2, size=900)
    x = rng.normal(size=(900, 16)) + 1.5 * np.where(y, 1, -1)[:, None] * np.eye(16)[0]
    found = learning_curve(x, [('no', 'yes')[k] for k in y], n_seeds=3, progress=False)
    assert {r['n'] for r in found} == {32, 64, 128, 256, 512} and len(found) == 15
    assert np.mean([r['score'] for r in found if r['n'] == 512]) > 0.88
    lot = learning_curve(x, [('no', 'yes')[k] for k in rng.permutation(y)], n_seeds=3, progress=False)
    assert abs(np.mean([r['score'] for r in lot]) - 0.5) < 0.08
