"Errors and private helpers of ftbook.merging.vocabulary."

from fastcore.test import test_fail as check_fail
from ftbook.merging.vocabulary import union_tokens


def test_union_tokens_1():
    check_fail(
        lambda: union_tokens([dict(a=0, b=1), dict(c=0, d=1)], ['x', 'y']), contains='y shares 0% of its tokens with x'
    )
