"Errors and private helpers of ftbook.quality.findings."

from fastcore.test import test_eq as check_eq, test_fail as check_fail
from ftbook.quality.findings import _kind_of, view_rows


def test_the_columns_say_what_kind_of_rows_they_are():
    check_eq(_kind_of([dict(prompt='a', completion='b', id=1)], None, None), ('instruction', None, None))
    check_eq(_kind_of([dict(text='a')], None, None), ('text', 'text', None))
    check_eq(_kind_of([dict(text='a', label='b')], None, None), ('classification', 'text', 'label'))
    rows = [dict(review=f'film {i} is fine', kind='ab'[i % 2], id=i) for i in range(8)]
    check_eq(_kind_of(rows, None, None), ('classification', 'review', 'kind'))
    check_eq(_kind_of(rows, None, 'id'), ('classification', 'review', 'id'))


def test_a_view_names_a_missing_column_and_joins_prompt_and_completion():
    check_fail(
        lambda: view_rows([dict(sentence='A fine film.', label='pos')], 'text'),
        contains="no column 'text'; there are 'sentence', 'label'",
    )
    chat = view_rows([dict(prompt='2 + 2?', completion='4'), dict(prompt='2 + 3?', completion='')])
    check_eq((chat.kind, chat.texts[0], list(chat.unusable)), ('instruction', '2 + 2?\n4', [1]))
