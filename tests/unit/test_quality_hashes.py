"Errors and private helpers of ftbook.quality.hashes."

from fastcore.test import test_eq as check_eq
import numpy as np

from ftbook.quality.hashes import _blocks, _firsts, _ranges, _starts


def test_ranges_and_starts_of_runs():
    check_eq(_ranges(np.array([3, 10]), np.array([2, 3])), [3, 4, 10, 11, 12])
    check_eq(_starts(np.array([2, 3, 1])), [0, 2, 5])


def test_each_hash_points_to_its_first_row_and_blocks_lose_no_text():
    check_eq(_firsts(np.array([7, 5, 7, 5, 9], np.uint64)), [0, 1, 0, 1, 4])
    check_eq(sum((part for _, part in _blocks(list('abcdefg'), 3)), []), list('abcdefg'))
