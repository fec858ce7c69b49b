"Texts and vectors that cannot be compared."

import numpy as np
import pytest

from ftbook.quality.surprise import bits_per_byte, pool_bits
from ftbook.quality.apart import domain_auc
from ftbook.quality.domains import domain_distances
from ftbook.quality.domain_measures import embedding_distance, ngram_divergence
from cases.domains import cloud, cooking, loaded, said


# Bits per byte


def test_texts_that_no_model_should_see(loaded):
    assert len(bits_per_byte(*loaded, [])) == 0
    assert np.isfinite(bits_per_byte(*loaded, ["half a pair \ud83d", "\x00"])).all()
    with pytest.raises(ValueError, match="not one string"):
        bits_per_byte(*loaded, "a film")
    with pytest.raises(ValueError, match="row 1: the text is NoneType"):
        bits_per_byte(*loaded, ["a", None])
    with pytest.raises(ValueError, match="1 or more"):
        bits_per_byte(*loaded, ["a"], max_length=0)
    with pytest.raises(ValueError, match="1 or more"):
        bits_per_byte(*loaded, ["a"], batch_size=0)
    with pytest.raises(ValueError, match="no text has a byte"):
        pool_bits(np.array([np.nan]), [""])
    with pytest.raises(ValueError, match="2 values for 1 texts"):
        pool_bits(np.ones(2), ["a"])


def test_a_tokenizer_without_bos_and_eos_needs_a_start(loaded):
    class Bare:
        bos_token_id = eos_token_id = None

    with pytest.raises(ValueError, match="neither a bos nor an eos"):
        bits_per_byte(loaded[0], Bare(), ["a"])


# Two-sample classifier


@pytest.mark.parametrize("f", [domain_auc, embedding_distance])
def test_vectors_that_do_not_fit(f):
    good, broken = cloud(9), cloud(9)
    broken[3, 1] = np.nan
    with pytest.raises(ValueError, match=r"\(9, 6\) and \(9, 5\)"):
        f(good, cloud(9, 5))
    with pytest.raises(ValueError, match="same d"):
        f(good, good[0])
    with pytest.raises(ValueError, match="row 3 of the second side is not finite"):
        f(good, broken)
    with pytest.raises(ValueError, match="first side has 1 rows"):
        f(good[:1], good)
    with pytest.raises(ValueError, match="second side has 0 rows"):
        f(good, good[:0])
    with pytest.raises(ValueError, match="n_folds must be 2"):
        domain_auc(good, good, n_folds=1)


# Divergence of n-grams


def test_texts_that_cannot_be_compared():
    with pytest.raises(ValueError, match="not one string"):
        ngram_divergence("a film", ["a"])
    with pytest.raises(ValueError, match="row 0: the text is int"):
        ngram_divergence([1], ["a"])
    with pytest.raises(ValueError, match="first side has no run of 1 words"):
        ngram_divergence([], ["a"])
    with pytest.raises(ValueError, match="second side has no run of 2 words"):
        ngram_divergence(["a b"], ["a"], 2)
    with pytest.raises(ValueError, match="n must be 1 or more"):
        ngram_divergence(["a"], ["a"], 0)


# All of them at once


def test_distances_of_what_does_not_fit():
    a = said(10, cooking)
    with pytest.raises(ValueError, match="vectors of both sides"):
        domain_distances(a, a, cloud(10))
    with pytest.raises(ValueError, match="9 target_vectors for 10 texts"):
        domain_distances(a, a, cloud(10), cloud(9))
    with pytest.raises(ValueError, match="row 1: the target text is float"):
        domain_distances(a, ["a", 1.0])
    with pytest.raises(ValueError, match="needed"):
        domain_distances(a[:1], a, cloud(1), cloud(10))
    with pytest.raises(ValueError, match="no run of 1 words"):
        domain_distances([], a)
