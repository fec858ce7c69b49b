"Values, types and messages of settings that check themselves."

import pickle
from dataclasses import replace
from typing import Annotated

import pytest
from pydantic import TypeAdapter

from ftbook.keys import (
    checked,
    Count,
    Flag,
    from_dicts,
    Function,
    Number,
    Problems,
    rule_words,
    Text,
    type_words,
    Whole,
)
from ftbook.problem import Problem
from ftbook.training.settings import Settings


def words(kind):
    schema = TypeAdapter(kind).json_schema()
    return type_words(schema), rule_words(schema)


@pytest.mark.parametrize(
    'kind, said',
    [
        (Number | None, ('a number or null', '')),
        (list[Text | Whole], ('a list of (text or a whole number)', '')),
        (dict[Text, Count], ('names with a whole number each', '')),
        (Count | None, ('a whole number or null', '1 or more')),
    ],
)
def test_a_type_in_words(kind, said):
    assert words(kind) == said


@checked
class Things:
    "Of every type."

    number: Annotated[Number | None, "a number"] = None
    mixed: Annotated[list[Text | Whole | None] | None, "a list"] = None
    named: Annotated[dict[Text, Whole] | None, "names"] = None
    whole: Annotated[Whole, "a whole number"] = 0
    text: Annotated[Text, "text"] = ''
    flag: Annotated[Flag, "a switch"] = False
    function: Annotated[Function | None, "only from Python"] = None


@pytest.mark.parametrize(
    'key, given, value',
    [
        ('number', '1e-3', 0.001),
        ('number', 2, 2.0),
        ('mixed', ['a', None, 1], ['a', None, 1]),
        ('named', {'q_proj': 4}, {'q_proj': 4}),
        ('function', print, print),
    ],
)
def test_values_take_the_type_of_their_key(key, given, value):
    made = getattr(from_dicts(Things, {key: given}), key)
    assert made == value and type(made) is type(value)


@pytest.mark.parametrize(
    'key, value',
    [
        ('whole', True),
        ('whole', '8'),
        ('whole', 2.5),
        ('text', False),
        ('text', 3),
        ('number', 'fast'),
        ('number', True),
        ('number', float('nan')),
        ('mixed', 'one'),
        ('mixed', [2.5]),
        ('named', {'a': 'b'}),
        ('flag', 1),
        ('flag', 'yes'),
        ('function', 'print'),
    ],
)
def test_a_value_of_another_type_is_refused(key, value):
    for make in (lambda: from_dicts(Things, {key: value}), lambda: Things(**{key: value})):
        with pytest.raises(Problem, match=f'^{key} must be') as e:
            make()
        assert e.value.where.key == key


def test_what_yaml_reads_as_a_switch_is_put_in_quotes():
    with pytest.raises(Problem) as e:
        from_dicts(Things, {'mixed': [True, False]})
    assert e.value.remedy.endswith('put them in quotes')
    with pytest.raises(Problem) as e:
        from_dicts(Things, {'number': True})
    assert e.value.remedy == ''


def test_positional_and_named_values_are_named_alike():
    with pytest.raises(Problems) as e:
        Settings(-1.0, 0, scedule='linear')
    assert [p.where.key for p in e.value.found] == ['lr', 'epochs', 'scedule']
    assert 'did you mean schedule?' in str(e.value)


def test_several_problems_get_their_file_and_survive_a_pickle():
    with pytest.raises(Problems) as e:
        from_dicts(Things, {'whole': 'x', 'text': 1})
    several = pickle.loads(pickle.dumps(e.value.at(file='it.yaml')))
    assert [str(p.where.file) for p in several.found] == ['it.yaml', 'it.yaml']
    assert str(several) == "it.yaml: whole must be a whole number, not 'x'\nit.yaml: text must be text, not 1"
    assert [p['key'] for p in several.as_dict()['problems']] == ['whole', 'text']


def test_settings_can_be_laid_over_one_another():
    assert replace(Settings(lr=1e-3), epochs=2) == Settings(lr=1e-3, epochs=2.0)
    settings = Settings(mixed=True, precision='float16').settled('cpu')
    assert (settings.lr, settings.max_tokens, settings.seed, settings.autocast) == (2e-4, 1024, 0, 'float16')
    assert Settings(precision='bfloat16').settled('cuda').autocast is None
    assert Settings().settled('cuda').max_tokens == 8192


@pytest.mark.parametrize(
    'wrong',
    [
        dict(epochs=0),
        dict(batch_size=0),
        dict(batch_size=True),
        dict(warmup=-0.1),
        dict(max_grad_norm=0.0),
        dict(lr=float('inf')),
        dict(precision='bf16'),
        dict(optimizer='adam9'),
        dict(regularizer=3),
        dict(trackers=[3]),
        dict(seed=-1),
    ],
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(Problem) as e:
        Settings(**wrong)
    assert e.value.where.key == next(iter(wrong))
