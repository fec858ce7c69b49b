"Duplicates: rows and settings that are refused."

import numpy as np
import pytest

from ftbook.quality.leaks import contained, leakage
from ftbook.quality.duplicates import exact_duplicates, find_duplicates
from ftbook.quality.minhash import lsh_pairs, minhash
from ftbook.quality.join import near_duplicates
from ftbook.quality.semantic import semantic_duplicates


# The join


@pytest.mark.parametrize(
    'call, message',
    [
        (lambda: near_duplicates('text'), 'not one string'),
        (lambda: near_duplicates(['a', 3]), 'row 1: the text is int'),
        (lambda: near_duplicates(['a'], other=[None]), 'row 0: the other text is NoneType'),
        (lambda: near_duplicates(['a'], 1.5), 'threshold must lie'),
        (lambda: near_duplicates(['a'], n_words=0), 'n_words and crowd'),
        (lambda: exact_duplicates([None]), 'row 0: the text is NoneType'),
        (lambda: find_duplicates(['a'], []), '0 labels for 1 texts'),
        (lambda: contained(['a'], [1]), 'row 0: the long text is int'),
        (lambda: contained(['a'], ['a'], shortest=0), 'shortest must lie'),
        (lambda: leakage(['a'], [b'a']), 'row 0: the test text is bytes'),
        (lambda: semantic_duplicates(np.ones(3)), 'must be'),
        (lambda: minhash([{1}, set()]), 'row 1: the set is empty'),
        (lambda: lsh_pairs(np.zeros((2, 10)), 3), 'do not make 3 equal bands'),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
