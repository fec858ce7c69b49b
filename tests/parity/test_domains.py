"Distances between sets of rows against scipy, scikit-learn and the model's own loss."

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, strategies as st
from scipy.spatial.distance import cdist, jensenshannon, pdist
from scipy.stats import energy_distance
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from ftbook.quality.probe import deal_folds
from ftbook.quality.apart import domain_auc
from ftbook.quality.domain_measures import embedding_distance, ngram_divergence, rank_auc
from cases.domains import cloud, loaded, quick, sentences, surprise, texts


# Bits per byte


def test_bits_are_those_of_the_loss(loaded, surprise):
    model, tokenizer = loaded
    for text, got in zip(texts, surprise):
        if not text:
            assert math.isnan(got)
            continue
        ids = torch.tensor(
            [
                [
                    tokenizer.bos_token_id,
                    *tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"],
                ]
            ]
        )
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
        assert got == pytest.approx(loss * (ids.shape[1] - 1) / math.log(2) / len(text.encode()), rel=1e-5)


# Two-sample classifier


@quick
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40))
def test_rank_auc_is_that_of_sklearn(pairs):
    scores, positive = map(np.array, zip(*pairs))
    if positive.all() or not positive.any():
        assert math.isnan(rank_auc(scores, positive))
        return
    assert rank_auc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))
    assert rank_auc(scores, positive) == pytest.approx(1 - rank_auc(-scores, positive))
    assert rank_auc(scores, positive) == pytest.approx(1 - rank_auc(scores, ~positive))


def test_domain_auc_is_the_mean_over_folds_of_sklearn():
    a, b = cloud(60), cloud(45, at=0.3, seed=1)
    x, side = np.concatenate([a, b]), np.repeat([0, 1], [60, 45])
    _, first, same = np.unique(x.round(5), axis=0, return_index=True, return_inverse=True)
    folds, found = deal_folds(side[first], 5, 0)[same], []
    for f in range(5):
        model = LogisticRegression(C=10, max_iter=1000).fit(x[folds != f], side[folds != f])
        found.append(roc_auc_score(side[folds == f], model.predict_proba(x[folds == f])[:, 1]))
    assert domain_auc(a, b) == pytest.approx(np.mean(found), abs=1e-6)


# Energy distance


@quick
@given(st.integers(2, 30), st.integers(2, 30), st.integers(1, 5), st.integers(0, 1000))
def test_energy_distance_is_that_of_scipy(n, m, d, seed):
    a, b = cloud(n, d, seed=seed), cloud(m, d, 0.5, seed + 1)
    assert embedding_distance(a, b) == pytest.approx(
        2 * cdist(a, b).mean() - pdist(a).mean() - pdist(b).mean(), abs=1e-5
    )
    assert embedding_distance(a, b) == pytest.approx(embedding_distance(b, a), abs=1e-9)
    assert embedding_distance(3 * a, 3 * b) == pytest.approx(3 * embedding_distance(a, b), abs=1e-5)
    if d == 1:  # scipy counts the distance of each row to itself
        assert embedding_distance(a, b) == pytest.approx(
            energy_distance(a[:, 0], b[:, 0]) ** 2 - pdist(a).mean() / n - pdist(b).mean() / m, abs=1e-5
        )


# Divergence of n-grams


@quick
@given(sentences, sentences)
def test_divergence_is_that_of_scipy(a, b):
    runs = [[w for t in side for w in t.replace("!", " ").replace("東", " 東 ").split()] for side in (a, b)]
    assume(all(runs))
    every = sorted({*runs[0], *runs[1]})
    expected = jensenshannon(*([side.count(w) for w in every] for side in runs), base=2) ** 2
    assert ngram_divergence(a, b) == pytest.approx(expected, abs=1e-7)
