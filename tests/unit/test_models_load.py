"Errors and private helpers of ftbook.models.load."

import pytest

from ftbook.models.load import load_model


@pytest.mark.parametrize(
    "name, said",
    [
        ("smollm", "Shipped with ftbook: smollm2-135m, minilm-l6"),
        ("minilm-l6", "writes no text: use `load_encoder`"),
    ],
)
def test_a_name_that_is_no_chat_model_is_refused(name, said):
    with pytest.raises((OSError, ValueError), match=said):
        load_model(name)
