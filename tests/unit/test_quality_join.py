"Errors and private helpers of ftbook.quality.join."

from fastcore.test import test_eq as check_eq, test_fail as check_fail
import numpy as np

from ftbook.quality.join import _may_match, _Sets, _slack, near_duplicates


def test_a_pair_whose_bits_differ_too_much_is_passed_over():
    some = _Sets(np.empty(0, np.uint64), np.array([10, 10]), np.array([0b1111, 0b0001], np.uint64))
    slack = _slack(some, 0.8)
    check_eq(slack[20], 2)  # two sets of ten at 0.8 share nine, so one in each is its own
    assert not _may_match(some, np.array([0]), np.array([1]), slack)[0]  # three bits differ: too many


def test_bad_input_is_named_and_rows_without_words_match_nothing():
    check_fail(lambda: near_duplicates('one text'), contains='not one string')
    check_fail(lambda: near_duplicates(['a', None]), contains='row 1: the text is NoneType')
    check_fail(lambda: near_duplicates(['a'], 0), contains='threshold must lie above 0')
    check_eq([len(near_duplicates(t)) for t in ([], [''], ['', '?'], ['?!', '?!'], ['yes', 'Yes!'])], [0, 0, 0, 0, 1])
