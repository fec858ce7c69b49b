"How far two sets of rows are from each other: within its bounds, and the same however it is computed."

import math, random

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from scipy.spatial.distance import cdist, pdist

from ftbook.quality.surprise import bits_per_byte, pool_bits
from ftbook.quality.checks import check_domain
from ftbook.quality.apart import domain_auc
from ftbook.quality.domains import domain_distances
from ftbook.quality.domain_measures import embedding_distance, ngram_divergence, telling_words
from ftbook.quality.minhash import shingles
from ftbook.quality.findings import view_rows
from cases.domains import cloud, cooking, loaded, quick, said, sailing, sentences, surprise, texts


# Bits per byte


@pytest.mark.parametrize("batch_size", [1, 3])
def test_bits_do_not_depend_on_the_batch(loaded, surprise, batch_size):
    np.testing.assert_allclose(bits_per_byte(*loaded, texts, batch_size=batch_size), surprise, rtol=1e-4)
    np.testing.assert_allclose(bits_per_byte(*loaded, texts[::-1])[::-1], surprise, rtol=1e-4)


def test_a_long_text_is_read_in_pieces_that_begin_with_the_token_before(loaded):
    model, tokenizer = loaded
    ids, total = tokenizer(texts[-1])["input_ids"], 0
    both = [tokenizer.bos_token_id, *ids]
    with torch.no_grad():
        for at in range(0, len(ids), 16):
            piece = torch.tensor([both[at : at + 17]])
            total += model(input_ids=piece, labels=piece).loss.item() * (piece.shape[1] - 1)
    got = bits_per_byte(model, tokenizer, [texts[-1]], max_length=16)[0]
    assert got == pytest.approx(total / math.log(2) / len(texts[-1].encode()), rel=1e-5)
    assert got > bits_per_byte(model, tokenizer, [texts[-1]])[0], "less context, more surprise"


def test_the_first_token_follows_what_it_is_told_to(loaded):
    model, tokenizer = loaded
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer("a film")["input_ids"]]])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert bits_per_byte(model, tokenizer, ["a film"], start=tokenizer.eos_token_id)[0] == pytest.approx(
        loss * (ids.shape[1] - 1) / math.log(2) / 6, rel=1e-5
    )


def test_order_surprises_less_than_disorder(loaded):
    plain = "The committee will meet again on Monday to discuss the results of the election."
    mixed = " ".join(random.Random(0).sample(plain.split(), len(plain.split())))
    one, other = bits_per_byte(*loaded, [plain, mixed])
    assert one < other


def test_the_model_is_left_as_it_was(loaded):
    model, tokenizer = loaded
    model.train()
    bits_per_byte(model, tokenizer, ["a film"])
    assert model.training
    model.eval()
    bits_per_byte(model, tokenizer, ["a film"])
    assert not model.training


def test_pooled_bits_are_all_bits_over_all_bytes(surprise):
    sizes = [len(t.encode()) for t in texts]
    expected = sum(v * n for v, n in zip(surprise, sizes) if n) / sum(sizes)
    assert pool_bits(surprise, texts) == pytest.approx(expected)


# Two-sample classifier


def test_two_clouds_apart_and_one_cloud():
    assert domain_auc(cloud(50), cloud(50, at=9, seed=1)) == 1
    at_home = [domain_auc(cloud(60, seed=2 * s), cloud(60, seed=2 * s + 1)) for s in range(60)]
    assert abs(np.mean(at_home) - 0.5) < 3 * np.std(at_home) / math.sqrt(60) and max(at_home) < 0.8
    assert 0.75 < np.std(at_home) / (1.5 * math.sqrt(121 / 12) / 60) < 1.25, "the error that check_domain allows for"
    there, back = (
        domain_auc(*pair)
        for pair in ((cloud(150), cloud(150, at=0.4, seed=1)), (cloud(150, at=0.4, seed=1), cloud(150)))
    )
    assert there == pytest.approx(back, abs=0.03) and there > 0.7


@quick
@given(st.integers(5, 20), st.integers(0, 1000))
def test_the_same_rows_on_both_sides_are_one_domain(n, seed):
    x = cloud(n, seed=seed)
    assert domain_auc(x, x) == 0.5
    assert domain_auc(x, x[::-1], seed=seed) == 0.5


def test_rows_in_common_do_not_betray_each_other():
    shared = cloud(40)
    found = domain_auc(np.concatenate([shared, cloud(40, seed=1)]), np.concatenate([shared, cloud(40, seed=2)]))
    assert 0.35 < found < 0.65


def test_all_rows_equal():
    assert domain_auc(np.ones((9, 3)), np.ones((7, 3))) == 0.5


# Energy distance


def test_few_rows_make_it_noisy_not_larger():
    few = [embedding_distance(cloud(8, seed=2 * s), cloud(8, seed=2 * s + 1)) for s in range(400)]
    assert min(few) < 0 < max(few) and abs(np.mean(few)) < 3 * np.std(few) / 20
    assert embedding_distance(cloud(300), cloud(300, at=1, seed=1)) < embedding_distance(
        cloud(300), cloud(300, at=2, seed=1)
    )


def test_many_rows_are_taken_in_blocks():
    a, b = cloud(2500, 2), cloud(1100, 2, 0.2, 1)
    assert embedding_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(
        2 * cdist(a, b).mean() - pdist(a).mean() - pdist(b).mean(), abs=1e-6
    )


# Divergence of n-grams


@quick
@given(sentences, sentences, st.integers(1, 3))
def test_divergence_is_symmetric_and_bounded(a, b, n):
    try:
        found = ngram_divergence(a, b, n)
    except ValueError as e:
        assert f"no run of {n} words" in str(e)
        return
    assert 0 <= found <= 1
    assert found == pytest.approx(ngram_divergence(b, a, n), abs=1e-12)
    assert ngram_divergence(a, a, n) == 0 == ngram_divergence(a, a[::-1] * 3, n)


def test_runs_of_two_know_about_order():
    assert ngram_divergence(["a b c"], ["c b a"]) == 0
    assert ngram_divergence(["a b c"], ["c b a"], 2) == 1
    assert shingles("a b c") == {("a", "b"), ("b", "c")}


def test_a_draw_is_one_of_all_runs_and_repeats_with_its_seed():
    a, b = said(50, cooking), said(50, sailing, 1)
    assert ngram_divergence(a, b, size=10**9) == ngram_divergence(a, b)
    assert (
        ngram_divergence(a, b, size=60, seed=3)
        == ngram_divergence(a, b, size=60, seed=3)
        != ngram_divergence(a, b, size=60, seed=4)
    )
    same = [ngram_divergence(a, said(50, cooking, 2), size=k) for k in (30, 300)]
    assert same[0] > same[1], "fewer words look farther"


# All of them at once


def test_both_sides_give_equally_many_rows():
    a, b = said(80, cooking), said(50, sailing, 1)
    found = domain_distances(a, b, cloud(80), cloud(50, at=3, seed=1))
    assert (
        found["rows"] == 50
        and found["auc"] > 0.95
        and found["distance"] > 1
        and found["ngrams"] > 2 * found["ngrams_mixed"]
    )
    assert domain_distances(a, b, n_rows=30)["rows"] == 30 and set(domain_distances(a, b)) == {
        "rows",
        "ngrams",
        "ngrams_mixed",
    }
    assert domain_distances(a, b, seed=1) == domain_distances(a, b, seed=1)


def test_one_domain_is_like_its_own_mixture():
    found = [domain_distances(said(60, cooking, 2 * s), said(60, cooking, 2 * s + 1), seed=s) for s in range(10)]
    gaps = [f["ngrams"] - f["ngrams_mixed"] for f in found]
    assert abs(np.mean(gaps)) < 3 * np.std(gaps) / math.sqrt(10)


def test_telling_words_are_those_that_differ():
    here, there = telling_words(said(200, cooking), said(200, sailing, 1), 6)
    assert set(here) <= set(cooking) - set(sailing) and set(there) <= set(sailing) - set(cooking)
    assert telling_words(["a"], ["!"]) == ([], []) and telling_words(["a b"], ["a b"]) == ([], [])


# The finding


def rows_of(texts):
    return view_rows([dict(text=t) for t in texts])


def test_a_shift_is_found_with_vectors_and_without():
    a, b = rows_of(said(250, cooking)), rows_of(said(250, sailing, 1))
    found = check_domain(a, b, cloud(250), cloud(250, at=3, seed=1))
    assert [f.where for f in found] == [f.where for f in check_domain(a, b)] == ["domain.shift"]
    assert "AUC" in found[0].message and "AUC" not in check_domain(a, b)[0].message and not found[0].drop
    assert set(found[0].message.split("training says ")[1].split(", the others")[0].split(", ")) <= set(cooking)


def test_one_domain_is_no_finding():
    a, b = rows_of(said(250, cooking)), rows_of(said(250, cooking, 1))
    assert (
        check_domain(a, b)
        == check_domain(a, b, cloud(250), cloud(250, seed=1))
        == check_domain(a, a, cloud(250), cloud(250))
        == []
    )


def test_rows_without_words_or_use_are_passed_over():
    rows = [dict(text=t) for t in (*said(60, cooking), "", "?!", None, "\ud800")]
    odd, good = view_rows(rows), rows_of(said(64, sailing, 1))
    vectors = np.concatenate([cloud(60), np.zeros((4, 6))])
    assert len(check_domain(odd, good, vectors, cloud(64, at=3, seed=1))) == 1
    assert check_domain(view_rows([dict(text=""), dict(text="x")]), good) == []
    assert check_domain(rows_of(["?!"] * 50), good) == []
