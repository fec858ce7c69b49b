"Label errors and balance on probabilities that nobody would choose."

import warnings
from collections import Counter

import numpy as np
import pytest, torch
from cleanlab.filter import find_label_issues
from hypothesis import given, strategies as st

from ftbook.quality.pruning import METHODS, calibrate_joint
from ftbook.quality.balance import adjust_logits, balance, macro_f1, resample
from ftbook.quality.checks import check_balance, check_labels
from ftbook.quality.classes import class_codes, long_tail
from ftbook.quality.confident import confident_class, confident_joint, confident_thresholds
from ftbook.quality.probe import deal_folds, fit_probe
from ftbook.quality.labels import flag_labels, out_of_fold
from ftbook.quality.suspects import label_errors
from ftbook.quality.findings import view_rows
from cases.labels import blobs, either, labels_of_some, usual


# What nobody would choose: ties, columns of zeros, certain rows, rows that add up to less than 1, classes without rows


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'May not flag all label issues', UserWarning)
        yield


# What cleanlab does not say


@usual
@given(either, st.sampled_from(METHODS), st.sampled_from(('cleanlab', 'paper')))
def test_names_of_classes_do_not_matter(case, method, rule):
    codes, p = case
    names = [chr(122 - c) for c in range(p.shape[1])]
    flags = flag_labels(codes.tolist(), p, range(p.shape[1]), method=method, rule=rule)
    np.testing.assert_array_equal(flags, flag_labels([names[c] for c in codes], p, names, method=method, rule=rule))


@usual
@given(either, st.sampled_from(('cleanlab', 'paper')), st.integers(0, 99))
def test_the_order_of_rows_does_not_matter(case, rule, seed):
    codes, p = case
    classes, order = range(p.shape[1]), np.random.default_rng(seed).permutation(len(codes))
    np.testing.assert_array_equal(
        flag_labels(codes.tolist(), p, classes, rule=rule)[order],
        flag_labels(codes[order].tolist(), p[order], classes, rule=rule),
    )


@usual
@given(either)
def test_the_rules_differ_only_where_several_classes_are_confident_or_the_given_one_is_best(case):
    codes, p = case
    thresholds = confident_thresholds(codes, p)
    ours, paper = (confident_class(p, thresholds, rule) for rule in ('cleanlab', 'paper'))
    above = p >= thresholds - 1e-6
    np.testing.assert_array_equal(ours[above.sum(1) < 2], paper[above.sum(1) < 2])
    sure = paper >= 0
    assert above[sure, paper[sure]].all() and (p[sure, paper[sure]] == np.where(above, p, -1)[sure].max(1)).all()
    np.testing.assert_array_equal(sure, above.any(1))
    assert (flag_labels(codes.tolist(), p, range(p.shape[1]), rule='paper') == (sure & (paper != codes))).all()


@usual
@given(either)
def test_the_calibrated_joint_adds_up(case):
    codes, p = case
    counts, k = np.bincount(codes, minlength=p.shape[1]), p.shape[1]
    joint = calibrate_joint(confident_joint(codes, confident_class(p, confident_thresholds(codes, p)), k), counts)
    assert joint.sum(1).tolist() == counts.tolist() and (joint >= 0).all()


@usual
@given(either, st.sampled_from(METHODS))
def test_errors_are_the_flags_with_the_surest_first(case, method):
    codes, p = case
    k, found = p.shape[1], label_errors(codes.tolist(), p, range(p.shape[1]), method=method)
    assert (
        sorted(f['row'] for f in found)
        == np.flatnonzero(flag_labels(codes.tolist(), p, range(k), method=method)).tolist()
    )
    assert [f['score'] for f in found] == sorted(f['score'] for f in found)
    for f in found:
        others = np.delete(p[f['row']], f['given'])
        assert f['given'] == codes[f['row']] != f['suggested']
        assert (f['p_given'], f['p_suggested']) == (p[f['row'], f['given']], others.max()) and f['rows_of_class'] == (
            codes == f['given']
        ).sum()


def test_one_class_has_no_errors():
    for method in METHODS:
        assert not flag_labels(['a'] * 5, np.ones((5, 1)), method=method).any()


# Out of fold


@usual
@given(st.lists(st.integers(0, 6), min_size=1, max_size=120), st.integers(2, 9), st.integers(0, 99))
def test_folds_are_even(codes, n_folds, seed):
    codes = np.array(codes)
    folds = deal_folds(codes, n_folds, seed)
    assert folds.min() >= 0 and folds.max() < n_folds
    np.testing.assert_array_equal(folds, deal_folds(codes, n_folds, seed))
    for part in (codes >= 0, *(codes == c for c in set(codes.tolist()))):
        sizes = np.bincount(folds[part], minlength=n_folds)
        assert sizes.max() - sizes.min() <= 1


def test_every_row_is_judged_by_a_model_that_never_saw_it():
    x, codes = blobs([30, 25, 20])
    p, folds = out_of_fold(x, codes.tolist(), seed=3), deal_folds(codes, 5, 3)
    for f in range(5):
        np.testing.assert_array_equal(
            p[folds == f], fit_probe(x[folds != f], codes[folds != f], n_classes=3, C=1)(x[folds == f])
        )
    np.testing.assert_allclose(p.sum(1), 1)
    turned = codes.copy()
    turned[7] = 2
    assert out_of_fold(x, turned.tolist(), seed=3, C=10)[7, 0] > 0.5 > out_of_fold(x, turned.tolist(), seed=3)[7, 2]


def test_arrays_tensors_and_lists_are_alike():
    x, codes = blobs([20, 20])
    names = [('no', 'yes')[c] for c in codes]
    p = out_of_fold(x, names)
    for features, labels in (
        (torch.tensor(x), names),
        (x.tolist(), np.array(names)),
        (x, codes),
        (x, codes.astype(bool)),
        (x, torch.tensor(codes)),
    ):
        np.testing.assert_array_equal(out_of_fold(features, labels), p)


def test_a_class_that_one_fold_never_saw():
    x, codes = blobs([40, 30, 1])
    with pytest.warns(UserWarning, match='1 of 3 classes have a single row, the first 2'):
        p = out_of_fold(x, codes.tolist())
    assert p.shape == (71, 3) and np.isfinite(p).all() and p[-1, 2] == 0
    np.testing.assert_allclose(p.sum(1), 1)
    for method in METHODS:
        np.testing.assert_array_equal(
            flag_labels(codes.tolist(), p, method=method), find_label_issues(codes, p, filter_by=method, n_jobs=1)
        )


@usual
@given(
    st.lists(
        st.one_of(
            st.text(max_size=3),
            st.integers(-2, 2),
            st.booleans(),
            st.floats(),
            st.none(),
            st.lists(st.integers(), max_size=1),
        ),
        max_size=8,
    )
)
def test_codes_stand_for_the_labels_or_the_row_is_named(labels):
    try:
        classes, codes = class_codes(labels)
    except ValueError as e:
        assert str(e).startswith('row ') and 'has the label' in str(e)
        return
    assert [classes[c] for c in codes] == labels and classes == sorted(set(labels))


# Findings


def view_of(labels):
    return view_rows([dict(text=f'row {i}', label=l) for i, l in enumerate(labels)])


def test_planted_errors_are_found_in_the_view():
    x, codes = blobs([60, 60])
    labels = [('no', 'yes')[c] for c in codes]
    # a row at the border may be either
    typical = {int(np.argmax(x[:, 0])), int(np.argsort(x[:, 0])[-2]), int(np.argmax(x[:, 1]))}
    for i in typical:
        labels[i] = dict(no='yes', yes='no')[labels[i]]
    found = check_labels(view_of(labels), x)
    assert typical <= set(found[0].rows) and len(found[0].rows) == len(found[0].evidence)
    assert all(0 <= i < 120 for i in found[0].rows)


@pytest.mark.parametrize(
    'labels', [['a'] * 60, ['a', 'b'] * 5, [*'abcdefghij'] * 1, ['a'] * 59 + ['b'], ['a'] * 58 + ['b', 'c']]
)
def test_too_little_to_judge_is_said_and_nothing_is_flagged(labels):
    x = np.random.default_rng(0).normal(size=(len(labels), 4))
    assert not [f for f in check_labels(view_of(labels), x) if f.rows or f.drop]


@usual
@given(
    st.lists(
        st.one_of(st.sampled_from('ab'), st.integers(0, 2), st.booleans(), st.floats(), st.none()),
        min_size=1,
        max_size=70,
    )
)
def test_any_label_column_gives_findings(labels):
    view = view_of(labels)
    found = [*check_balance(view), *check_labels(view, np.random.default_rng(0).normal(size=(len(labels), 4)))]
    assert all(set(f.rows) <= set(view.usable) for f in found)


# Balance


@usual
@given(labels_of_some)
def test_the_effective_number_lies_between_one_and_all(labels):
    spread, n = balance(labels), Counter(labels)
    assert spread['counts'] == dict(n) and list(spread['counts'].values()) == sorted(n.values(), reverse=True)
    assert spread['ratio'] == max(n.values()) / min(n.values())
    assert 1 - 1e-9 <= spread['effective'] <= len(n) + 1e-9
    if spread['ratio'] == 1:
        assert spread['effective'] == pytest.approx(len(n))


def test_balance_of_nothing():
    with pytest.raises(ValueError, match='there are no labels to count'):
        balance([])


@usual
@given(labels_of_some, st.sampled_from(('over', 'under')), st.integers(0, 99))
def test_resampled_rows_are_even(labels, how, seed):
    rows, n = resample(labels, how, seed), Counter(labels)
    size = max(n.values()) if how == 'over' else min(n.values())
    assert Counter(labels[i] for i in rows) == dict.fromkeys(n, size)
    np.testing.assert_array_equal(rows, resample(labels, how, seed))
    times = np.bincount(rows, minlength=len(labels))
    if how == 'under':
        assert times.max() == 1
    else:
        assert times.min() >= 1
        for c in n:  # no row of a class more than once oftener than another
            own = times[[i for i, l in enumerate(labels) if l == c]]
            assert own.max() - own.min() <= 1


def test_another_seed_draws_others():
    labels = ['a'] * 90 + ['b'] * 10
    assert {tuple(sorted(resample(labels, 'under', s))) for s in range(5)}.__len__() == 5


@usual
@given(st.integers(1, 2000), st.integers(1, 20), st.floats(1, 200))
def test_a_long_tail_keeps_its_total(n, k, ratio):
    sizes = long_tail(n, k, ratio)
    assert sizes.sum() == n and (sizes >= 0).all()
    assert (np.diff(sizes) <= 1).all()  # rounding may turn two neighbours round by one row
    if k == 2 and n / (1 + ratio) > 20:
        assert sizes[0] / sizes[1] == pytest.approx(ratio, rel=0.06)


@usual
@given(st.lists(st.integers(1, 500), min_size=2, max_size=6), st.floats(0, 3), st.integers(0, 99))
def test_adjusted_logits_lose_the_prior(counts, tau, seed):
    counts, logits = np.array(counts), np.random.default_rng(seed).normal(size=(7, len(counts)))
    ours = adjust_logits(logits, counts, tau)
    np.testing.assert_allclose(ours, logits - tau * np.log(counts / counts.sum()))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        t = adjust_logits(torch.tensor(logits, dtype=dtype), counts, tau)
        assert t.dtype == dtype
    np.testing.assert_allclose(adjust_logits(torch.tensor(logits), torch.tensor(counts), tau).numpy(), ours)
    np.testing.assert_array_equal(adjust_logits(logits, counts, 0.0), logits)
    if len(set(counts.tolist())) == 1:
        np.testing.assert_array_equal(ours.argmax(1), logits.argmax(1))


def test_adjusting_undoes_what_imbalance_did():
    x, codes = blobs([400, 8], seed=1)
    T, y = blobs([300, 300], seed=2)
    p = fit_probe(x, codes, n_classes=2)(T)
    plain, adjusted = (macro_f1(y, scores.argmax(1), 2) for scores in (p, adjust_logits(np.log(p), [400, 8])))
    assert adjusted > plain
