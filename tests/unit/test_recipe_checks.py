"Errors and private helpers of ftbook.recipe.checks."

from fastcore.test import test_eq as check_eq
from ftbook.recipe.checks import _by_file, _flat, _refuse, _strings, Prepared
from ftbook.recipe.config import DataKeys, Recipe
from ftbook.recipe.rows import find_labels, shape_rows


def test_prepared_1():
    few = [
        {'text': 'great', 'label': 'good'},
        {'text': 'poor', 'label': 'bad'},
        {'text': 7, 'label': 'bad'},
        {'text': 'so so', 'label': ''},
    ]
    shaped, refused = shape_rows(few, DataKeys(), find_labels(few, DataKeys()))
    p = Prepared(Recipe())
    _refuse(p, refused, 4, 'data.source')
    check_eq(
        p.findings.errors[0].message,
        "2 of 4 rows cannot be used. row 2: field 'text' must be text, not 7; row 3: 'label' is empty",
    )


def test_by_file_1():
    check_eq(
        _by_file('row 2 has 9 tokens: give `max_length=8` to cut what is longer', 7),
        'row 7 has 9 tokens: set data.max_length to 8 to cut what is longer',
    )


def test_strings_1():
    check_eq(_strings({'prompt': 'Q: a\n\nb', 'completion': 'c'}), ['Q: a\n\nb', 'c', 'b'])


def test_flat_1():
    check_eq(_flat({'train': {'lr': 1}, 'seed': 0}), {'train.lr': 1, 'seed': 0})
