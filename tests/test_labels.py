"Label errors and balance, held against cleanlab and scikit-learn on probabilities that nobody would choose."

import warnings
from collections import Counter

import numpy as np
import pytest, torch
from cleanlab.count import compute_confident_joint, get_confident_thresholds
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from hypothesis import assume, given, settings, strategies as st
from sklearn.metrics import f1_score
from sklearn.utils.class_weight import compute_sample_weight

from ftbook.quality.pruning import METHODS, calibrate_joint, label_scores
from ftbook.quality.balance import adjust_logits, balance, class_weights, macro_f1, resample
from ftbook.quality.checks import check_balance, check_labels
from ftbook.quality.classes import class_codes, long_tail
from ftbook.quality.confident import confident_class, confident_joint, confident_thresholds
from ftbook.quality.probe import deal_folds, fit_probe
from ftbook.quality.labels import flag_labels, out_of_fold
from ftbook.quality.suspects import label_errors
from ftbook.quality.findings import view_rows

parity = settings(max_examples=400, deadline=None)
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


def two_classes(codes):
    assume(len(set(codes.tolist())) > 1)  # cleanlab refuses labels of one class


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'May not flag all label issues', UserWarning)
        yield


# The same as cleanlab


@pytest.mark.parametrize('method', METHODS)
def test_flags_are_those_of_cleanlab(method):
    @parity
    @given(either)
    def holds(case):
        codes, p = case
        two_classes(codes)
        ours = flag_labels(codes.tolist(), p, range(p.shape[1]), method=method)
        np.testing.assert_array_equal(ours, find_label_issues(codes, p, filter_by=method, n_jobs=1))

    holds()


@parity
@given(either)
def test_thresholds_and_joints_are_those_of_cleanlab(case):
    codes, p = case
    two_classes(codes)
    thresholds, k = confident_thresholds(codes, p), p.shape[1]
    np.testing.assert_array_equal(thresholds, get_confident_thresholds(codes, p))
    joint = confident_joint(codes, confident_class(p, thresholds), k)
    theirs = compute_confident_joint(codes, p, calibrate=False)
    # they never leave a diagonal at 0
    np.testing.assert_array_equal(np.where(np.eye(k, dtype=bool), joint.clip(1), joint), theirs)
    np.testing.assert_array_equal(
        calibrate_joint(joint, np.bincount(codes, minlength=k)), compute_confident_joint(codes, p, calibrate=True)
    )


@parity
@given(either)
def test_scores_are_those_of_cleanlab(case):
    codes, p = case
    for ours, theirs in dict(normalised_margin='normalized_margin', self_confidence='self_confidence').items():
        np.testing.assert_array_equal(label_scores(codes, p, ours), get_label_quality_scores(codes, p, method=theirs))


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


def blobs(sizes, seed=0, d=4):
    rng, codes = np.random.default_rng(seed), np.repeat(np.arange(len(sizes)), sizes)
    x = 3 * np.eye(max(d, len(sizes)))[codes] + rng.normal(size=(len(codes), max(d, len(sizes))))
    return x / np.linalg.norm(x, axis=1, keepdims=True), codes


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


@pytest.mark.parametrize(
    'labels, said',
    [
        (['a', 1] * 10, r"row 1 has the label 1 \(int\), row 0 has 'a' \(str\)"),
        ([1, True] * 10, r'row 1 has the label True \(bool\)'),
        ([0.5, 1.0] * 10, 'row 0 has the label 0.5: a label is a string or an integer'),
        (['a', None] * 10, 'row 1 has the label None'),
        (['a', ''] * 10, "row 1 has the label ''"),
        (['a', float('nan')] * 10, 'row 1 has the label nan'),
        (['a', ['b']] * 10, r"row 1 has the label \['b'\]"),
        (['a'] * 20, "every row has the label 'a'"),
        (['a', 'b'], '2 rows cannot fill 5 folds'),
        (['a', 'b'] * 9, r'shape \(20, 4\), but there are 18 labels'),
        ([], 'there are no rows'),
    ],
)
def test_labels_that_cannot_be_used(labels, said):
    x = np.random.default_rng(0).normal(size=(len(labels) if len(labels) in (0, 2) else 20, 4))
    with pytest.raises(ValueError, match=said):
        out_of_fold(x, labels)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_features_that_are_no_numbers(bad):
    x, codes = blobs([20, 20])
    x[11, 2] = bad
    with pytest.raises(ValueError, match=r'the features of row 11 are not finite \(1 such rows\)'):
        out_of_fold(x, codes.tolist())


@pytest.mark.parametrize('shape', [(40,), (40, 2, 2), (39, 4)])
def test_features_of_another_shape(shape):
    with pytest.raises(ValueError, match='one row of numbers for each label'):
        out_of_fold(np.zeros(shape), [0, 1] * 20)


def test_too_few_folds():
    x, codes = blobs([20, 20])
    with pytest.raises(ValueError, match='n_folds must be 2 or more, not 1'):
        out_of_fold(x, codes.tolist(), 1)


def test_probabilities_that_do_not_fit():
    good = np.full((4, 2), 0.5)
    with pytest.raises(ValueError, match=r'shape \(4, 3\), not \(4, 2\)'):
        flag_labels([0, 1, 0, 1], np.full((4, 3), 1 / 3))
    with pytest.raises(ValueError, match=r'shape \(3, 2\), not \(4, 2\)'):
        flag_labels([0, 1, 0, 1], good[:3])
    for bad in (np.nan, 1.5, -0.1):
        p = good.copy()
        p[2, 0] = bad
        with pytest.raises(ValueError, match='row 2 has a probability'):
            label_errors([0, 1, 0, 1], p)
    with pytest.raises(ValueError, match="method 'both'"):
        flag_labels([0, 1, 0, 1], good, method='both')
    with pytest.raises(ValueError, match='row 3 has the label 7'):
        flag_labels([0, 1, 0, 7], good, [0, 1])
    with pytest.raises(ValueError, match="not 'entropy'"):
        label_scores(np.array([0, 1, 0, 1]), good, 'entropy')


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

labels_of_some = st.lists(st.sampled_from('abcdef'), min_size=1, max_size=200)


@usual
@given(labels_of_some)
def test_weights_are_those_of_sklearn(labels):
    np.testing.assert_allclose(class_weights(labels), compute_sample_weight('balanced', labels), rtol=1e-12)


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
@given(st.integers(1, 6), st.data())
def test_macro_f1_is_that_of_sklearn(k, data):
    n = data.draw(st.integers(1, 60))
    truth, said = (np.array(data.draw(st.lists(st.integers(0, k - 1), min_size=n, max_size=n))) for _ in range(2))
    # a class that is never met counts 0
    expected = f1_score(truth, said, labels=range(k), average='macro', zero_division=0)
    assert macro_f1(truth, said, k) == pytest.approx(expected, abs=1e-12)
    # without `labels`, sklearn leaves such a class out of the mean
    met = len(set(truth.tolist()) | set(said.tolist()))
    assert macro_f1(truth, said, k) * k / met == pytest.approx(
        f1_score(truth, said, average='macro', zero_division=0), abs=1e-12
    )


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


@pytest.mark.parametrize(
    'counts, said',
    [
        ([5, 0], 'class 1 has 0 training rows'),
        ([5, 5, 5], '2 columns of logits, but 3 counts'),
        ([5, -1], 'class 1 has -1 training rows'),
    ],
)
def test_counts_that_cannot_be_used(counts, said):
    with pytest.raises(ValueError, match=said):
        adjust_logits(np.zeros((3, 2)), counts)


def test_resampling_takes_two_words():
    with pytest.raises(ValueError, match="'over' or 'under', not 'smote'"):
        resample(['a', 'b'], 'smote')
