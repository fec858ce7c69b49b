"Errors and private helpers of ftbook.data.rows."

from fastcore.test import test_fail as check_fail
from ftbook.data.rows import assistant, row_parts, user


def test_dict_1():
    for bad, message in [
        (dict(question='a'), "row 7 has none of 'messages', 'prompt' with 'completion', 'text'; it has 'question'"),
        (dict(prompt='a', answer='b'), "row 7 has no 'completion' beside 'prompt'; it has 'prompt', 'answer'"),
        (dict(prompt='a', completion=' '), "row 7: field 'completion' is empty"),
        (dict(prompt='a', completion=None), "'completion' is NoneType"),
        (dict(prompt='a', completion=[assistant('b')]), "'prompt' is str and 'completion' is list"),
        (dict(messages='Hi'), "row 7: field 'messages' must be a list of messages, not str 'Hi'"),
        (dict(messages=[user('a'), user('b')]), "must end with an answer of the assistant, not of 'user'"),
        (dict(messages=[user('a'), dict(role='assistant', content=3)]), "message 1 needs a 'content' that is a string"),
        ('text', 'row 7 must be a dict, not str'),
    ]:
        check_fail(row_parts, args=(bad, 7), contains=message)
