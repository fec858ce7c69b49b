"Errors and private helpers of ftbook.data.rows."

import re

import pytest

from ftbook.data.rows import assistant, row_parts, user


@pytest.mark.parametrize(
    "row, said",
    [
        (
            dict(question="a"),
            "row 7: there is none of 'messages', 'prompt' with 'completion', 'text'; it has 'question'",
        ),
        (dict(prompt="a", answer="b"), "row 7: there is no 'completion' beside 'prompt'; it has 'prompt', 'answer'"),
        (dict(prompt="a", completion=" "), "row 7: field 'completion' is empty"),
        (dict(prompt="a", completion=None), "'completion' is NoneType"),
        (dict(prompt="a", completion=[assistant("b")]), "'prompt' is str and 'completion' is list"),
        (dict(messages="Hi"), "row 7: field 'messages' must be a list of messages, not str 'Hi'"),
        (dict(messages=[user("a"), user("b")]), "must end with an answer of the assistant, not of 'user'"),
        (
            dict(messages=[user("a"), dict(role="assistant", content=3)]),
            "message 1 needs a 'content' that is a string",
        ),
        ("text", "row 7: a row must be a dict, not str"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(row, said):
    with pytest.raises((ValueError, TypeError), match=re.escape(said)):
        row_parts(row, 7)
