"Private helpers of ftbook.recipe.checks."

from ftbook.problem import Problem
from ftbook.recipe.checks import _by_file, _refuse, Prepared
from ftbook.recipe.config import DataKeys, Recipe
from ftbook.recipe.from_rows import settled_keys
from ftbook.recipe.machine import _flat, _strings
from ftbook.recipe.rows import find_labels, shape_rows


def test_rows_that_are_refused_are_counted_and_named():
    few = [
        {'text': 'great', 'label': 'good'},
        {'text': 'poor', 'label': 'bad'},
        {'text': 7, 'label': 'bad'},
        {'text': 'so so', 'label': ''},
    ]
    keys = settled_keys(few, DataKeys())
    _, refused = shape_rows(few, keys, find_labels(few, keys))
    p = Prepared(Recipe())
    _refuse(p, refused, len(few), 'data.source')
    assert [f.message for f in p.findings.errors] == [
        "2 of 4 rows cannot be used. row 2: field 'text' must be text, not 7; row 3: 'label' is empty"
    ]


def test_a_complaint_names_the_row_of_the_file():
    problem = Problem('9 tokens, the limit is 8', 'give `max_length=8`', row=2, key='max_length')
    said = str(_by_file(problem, 7, 8))
    assert said == 'row 7, max_length: 9 tokens, the limit is 8: set data.max_length to 8 to cut what is longer'


def test_the_text_behind_an_instruction_is_found():
    assert _strings({'prompt': 'Q: a\n\nb', 'completion': 'c'}) == ['Q: a\n\nb', 'c', 'b']


def test_nested_keys_become_dotted_ones():
    assert _flat({'train': {'lr': 1}, 'seed': 0}) == {'train.lr': 1, 'seed': 0}
