"Label errors and balance against cleanlab and scikit-learn."

import numpy as np
import pytest
from cleanlab.count import compute_confident_joint, get_confident_thresholds
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from hypothesis import assume, given, settings, strategies as st
from sklearn.metrics import f1_score
from sklearn.utils.class_weight import compute_sample_weight

from ftbook.quality.pruning import METHODS, calibrate_joint, label_scores
from ftbook.quality.balance import class_weights, macro_f1
from ftbook.quality.confident import confident_class, confident_joint, confident_thresholds
from ftbook.quality.labels import flag_labels
from cases.labels import either, labels_of_some, usual

parity = settings(max_examples=400, deadline=None)

# What nobody would choose: ties, columns of zeros, certain rows, rows that add up to less than 1, classes without rows


def two_classes(codes):
    assume(len(set(codes.tolist())) > 1)  # cleanlab refuses labels of one class


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


# Balance


@usual
@given(labels_of_some)
def test_weights_are_those_of_sklearn(labels):
    np.testing.assert_allclose(class_weights(labels), compute_sample_weight('balanced', labels), rtol=1e-12)


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
