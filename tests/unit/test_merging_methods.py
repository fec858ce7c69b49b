"Errors and private helpers of ftbook.merging.methods."

from fastcore.test import test_close as check_close
import numpy as np

from ftbook.merging.methods import merge_agreeing, trim_


def test_merge_agreeing_1():
    d = np.float32([[0.9, -0.1, 0.5, -0.6], [0.7, 0.2, -0.8, 0.0]])
    trimmed = trim_(d.copy(), [0.5, 0.5])
    zero = np.zeros(4, np.float32)
    check_close(merge_agreeing(zero, trimmed, [1, 1]), merge_agreeing(zero, trimmed, [1, 1], weigh_first=False))
