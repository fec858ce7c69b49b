"Errors and private helpers of ftbook.merging.search."

from fastcore.test import test_close as check_close
import numpy as np

from ftbook.merging.search import search
from ftbook.merging.vectors import task_arithmetic


def test_search_1():
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

    def errors(theta):
        return {k: float(np.square(x @ theta - y).mean()) for k, (x, y) in tasks.items()}

    vectors = {k: t - theta0 for k, t in tuned.items()}
    stack = np.stack(list(vectors.values()))

    def toy_score(w):
        return -max(errors(task_arithmetic(theta0, stack, w)).values())

    found = search(toy_score, [0.5, 0.5], high=1.5)
    check_close(found.weights, [1, 1], eps=0.1)


def test_len_1():
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

    def errors(theta):
        return {k: float(np.square(x @ theta - y).mean()) for k, (x, y) in tasks.items()}

    vectors = {k: t - theta0 for k, t in tuned.items()}
    stack = np.stack(list(vectors.values()))

    def toy_score(w):
        return -max(errors(task_arithmetic(theta0, stack, w)).values())

    found = search(toy_score, [0.5, 0.5], high=1.5)
    assert found.score > found.start and len(found.tried) <= 30
    found.weights, found.start, found.score
