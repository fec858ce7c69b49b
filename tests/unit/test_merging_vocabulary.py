"Errors and private helpers of ftbook.merging.vocabulary."

import pytest

from ftbook.merging.vocabulary import union_tokens


def test_vocabularies_without_a_common_token_are_refused():
    with pytest.raises(ValueError, match="y shares 0% of its tokens with x"):
        union_tokens([dict(a=0, b=1), dict(c=0, d=1)], ["x", "y"])
