"Errors and private helpers of ftbook.fewshot.tuning."

from fastcore.test import test_fail as check_fail
from ftbook.fewshot.tuning import Tuning


def test_tuning_1():
    check_fail(lambda: Tuning(loss='triplet'), contains="'similarity' or 'contrastive'")
    check_fail(lambda: Tuning(steps=0), contains='steps must be 1 or more')
