"Errors and private helpers of ftbook.data.encoding."

import pytest

from ftbook.data.encoding import encode
from ftbook.models.load import load_tokenizer


def test_a_row_beyond_the_limit_of_the_model_is_refused():
    tokenizer = load_tokenizer("smollm2-135m")
    tokenizer.model_max_length = 64
    row = dict(prompt="What is a token?", completion="word " * 80)
    with pytest.raises(ValueError, match="row 0, max_length: .* tokens, the model's limit is 64: give"):
        encode([row], tokenizer)
