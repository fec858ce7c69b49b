"Errors and private helpers of ftbook.fewshot.report."

from fastcore.test import test_eq as check_eq, test_fail as check_fail
from ftbook.fewshot.report import pick_columns


def test_pick_columns_1():
    check_eq(
        pick_columns([dict(id=1, body='a long text', kind='x'), dict(id=2, body='another text', kind='x')]),
        ('body', 'kind'),
    )
    check_fail(lambda: pick_columns([dict(text='3.5', label='a')]), contains='no text but numbers')
    check_fail(
        lambda: pick_columns([dict(text='a', label='a')], text_column='body'), contains="there are 'text', 'label'"
    )
