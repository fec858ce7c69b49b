"Labels, features, folds and counts that cannot be used."

import numpy as np
import pytest

from ftbook.quality.pruning import label_scores
from ftbook.quality.balance import adjust_logits, resample
from ftbook.quality.labels import flag_labels, out_of_fold
from ftbook.quality.suspects import label_errors
from cases.labels import blobs


# Out of fold


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


# Balance


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
