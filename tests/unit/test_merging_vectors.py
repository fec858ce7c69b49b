"Errors and private helpers of ftbook.merging.vectors."

from fastcore.test import test_close as check_close, test_eq as check_eq
import numpy as np

from ftbook.merging.vectors import conflicts, slerp_weights, soup


def test_float_1():
    def fit(theta, x, y, steps=300):
        "Least squares by gradient descent, from `theta`."
        for _ in range(steps):
            theta = theta - 0.1 * x.T @ (x @ theta - y) / len(x)
        return theta

    g = np.random.default_rng(0)

    def normal(*shape):
        return g.standard_normal(shape, np.float32)

    theta0, goal = normal(8), normal(8)
    left, right = (normal(64, 8) * mask for mask in (np.arange(8) < 4, np.arange(8) >= 4))
    tasks = {'left': (left, left @ goal), 'right': (right, right @ goal)}
    tuned = {k: fit(theta0, *t) for k, t in tasks.items()}
    vectors = {k: t - theta0 for k, t in tuned.items()}
    check_close(float(vectors['left'] @ vectors['right']), 0)


def test_soup_1():
    u, v = np.eye(2, dtype=np.float32)
    check_close(np.linalg.norm(soup(np.stack([u, v]), [1, 1])), 0.5**0.5, eps=1e-6)


def test_slerp_weights_1():
    check_eq(slerp_weights(1.0, 0.25), (0.75, 0.25))


def test_conflicts_1():
    check_eq(conflicts(np.zeros((2, 3))), 0.0)
