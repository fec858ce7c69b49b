"Errors and private helpers of ftbook.quality.findings."

from fastcore.test import test_eq as check_eq, test_fail as check_fail
from ftbook.quality.findings import _kind_of, view_rows


def test_the_columns_say_what_kind_of_rows_they_are():
    check_eq(_kind_of({'prompt', 'completion', 'id'}, 'text', 'label'), 'instruction')
    check_eq([_kind_of({'text', *more}, 'text', 'label') for more in ((), ('label',))], ['text', 'classification'])


def test_a_view_names_a_missing_column_and_joins_prompt_and_completion():
    check_fail(
        lambda: view_rows([dict(sentence='A fine film.', label='pos')]),
        contains="no column 'text'; there are 'label', 'sentence'",
    )
    chat = view_rows([dict(prompt='2 + 2?', completion='4'), dict(prompt='2 + 3?', completion='')])
    check_eq((chat.kind, chat.texts[0], list(chat.unusable)), ('instruction', '2 + 2?\n4', [1]))
