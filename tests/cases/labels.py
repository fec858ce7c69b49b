"Made-up probabilities and labels."

import numpy as np
from hypothesis import settings, strategies as st

usual = settings(max_examples=100, deadline=None)

# What nobody would choose: ties, columns of zeros, certain rows, rows that add up to less than 1, classes without rows


@st.composite
def small(draw):
    "(codes, probabilities) of a few rows, from small whole numbers: ties everywhere."
    k = draw(st.integers(2, 5))
    n = draw(st.integers(k, 14))
    weights = np.array(
        draw(st.lists(st.lists(st.integers(0, 3), min_size=k, max_size=k), min_size=n, max_size=n)), float
    )
    return np.array(draw(st.lists(st.integers(0, k - 1), min_size=n, max_size=n))), weights / np.maximum(
        weights.sum(1, keepdims=True), 1
    )


@st.composite
def large(draw):
    "(codes, probabilities) of up to 300 rows and ten classes, from a seed."
    k, rng = draw(st.integers(2, 10)), np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(k, 300))
    p = rng.dirichlet(np.full(k, draw(st.sampled_from((0.02, 0.2, 1.0, 5.0)))), n)
    codes = np.where(
        rng.random(n) < draw(st.sampled_from((0.0, 0.2, 0.6, 1.0))),
        p.argmax(1),
        rng.integers(draw(st.integers(1, k)), size=n),
    )
    shape = draw(
        st.sampled_from(
            ('as drawn', 'ties', 'a column of zeros', 'a constant column', 'certain', 'all alike', 'own class favoured')
        )
    )
    if shape == 'ties':
        p = np.round(p * 4) / 4
    if shape == 'a column of zeros':
        p[:, rng.integers(k)] = 0
    if shape == 'a constant column':
        p[:, rng.integers(k)] = 0.3
    if shape == 'certain':
        p = np.eye(k)[p.argmax(1)]
    if shape == 'all alike':
        p[:] = 1 / k
    if shape == 'own class favoured':
        p = 0.5 * p + 0.5 * np.eye(k)[codes]
    return codes, p


either = st.one_of(small(), large())

# Out of fold


def blobs(sizes, seed=0, d=4):
    rng, codes = np.random.default_rng(seed), np.repeat(np.arange(len(sizes)), sizes)
    x = 3 * np.eye(max(d, len(sizes)))[codes] + rng.normal(size=(len(codes), max(d, len(sizes))))
    return x / np.linalg.norm(x, axis=1, keepdims=True), codes


# Balance

labels_of_some = st.lists(st.sampled_from('abcdef'), min_size=1, max_size=200)
