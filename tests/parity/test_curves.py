"The power law against the least squares of scipy."

import numpy as np

from ftbook.quality.power_law import fit_power_law, power_law
from cases.curves import sizes


def test_it_is_the_least_squares_of_scipy():
    from scipy.optimize import least_squares

    error = power_law(sizes, 0.1, 1.0, 0.5) * (1 + 0.05 * np.random.default_rng(0).normal(size=7))
    ours = fit_power_law(sizes, error[None])[0]

    def miss(p):
        return (power_law(sizes, *p) - error) / error

    theirs = least_squares(miss, ours, bounds=([0, 0, 0.05], [1, 10, 3])).x
    assert (miss(ours) ** 2).sum() <= (miss(theirs) ** 2).sum() * 1.02
