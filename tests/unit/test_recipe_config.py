"Errors and private helpers of ftbook.recipe.config."

import pytest, yaml

from ftbook.recipe.config import (
    _as,
    _checked,
    _contradiction,
    _hints,
    _in_words,
    _Loader,
    _nearest,
    DataKeys,
    foreign_keys,
    MethodKeys,
    METHODS,
    Recipe,
    TrainKeys,
)


@pytest.mark.parametrize(
    'kind, words',
    [
        (float | None, 'a number or null'),
        (list[str | int], 'a list of (text or a whole number)'),
        (dict[str, int], 'names with a whole number each'),
    ],
)
def test_a_type_in_words(kind, words):
    assert _in_words(kind) == words


def test_values_take_the_type_of_their_key():
    assert _as(float, '1e-3') == 0.001
    assert _as(list[str | int | None], ['a', None, 1]) == ['a', None, 1]
    assert _as(dict[str, int] | None, {'q_proj': 4}) == {'q_proj': 4}


@pytest.mark.parametrize(
    'kind, value',
    [(int, True), (str, False), (float, 'fast'), (list[str], 'one'), (int, 2.5), (dict[str, int], {'a': 'b'})],
)
def test_a_value_of_another_type_is_refused(kind, value):
    with pytest.raises(TypeError):
        _as(kind, value)


@pytest.mark.parametrize(
    'section, name, value, says',
    [
        (MethodKeys, 'rank', 0, 'method.rank must be a whole number, 1 or more, not 0'),
        (TrainKeys, 'lr', 'fast', "method.lr must be a number or null, above 0, not 'fast'"),
        (MethodKeys, 'type', 'qlora', f"method.type must be text, one of {', '.join(METHODS)}, not 'qlora'"),
        (DataKeys, 'labels', [True, False], 'put them in quotes'),
    ],
)
def test_a_complaint_names_key_value_and_what_is_wanted(section, name, value, says):
    with pytest.raises(ValueError) as e:
        _checked(f'method.{name}', _hints(section)[name], value)
    assert says in str(e.value)


@pytest.mark.parametrize(
    'written, meant',
    [
        ('method.rnak', 'method.rank'),
        ('lr', 'train.lr'),
        ('train.max_step', 'train.max_steps'),
        ('data.rank', 'method.rank'),
        ('xyzzy', ''),
    ],
)
def test_the_nearest_known_key(written, meant):
    assert _nearest(written) == meant


def test_keys_of_another_method():
    assert foreign_keys(MethodKeys('houlsby', bottleneck_size=8)) is None
    full = 'method.rank does not belong to method.type full, which has no other keys'
    assert foreign_keys(MethodKeys('full', rank=8)) == full
    said = foreign_keys(MethodKeys('prompt', rank=8, use_dora=True))
    assert said.startswith('method.rank, method.use_dora do not belong to method.type prompt')


def test_cuts_want_a_label_more_than_they_are():
    cut = Recipe(data=DataKeys('stars.csv', cuts=[-1, 1], labels=['poor', 'good']))
    said = 'data.cuts has 2 cuts, so data.labels must name 3 labels, not 2; a null leaves rows out'
    assert _contradiction(cut) == said
    assert _contradiction(Recipe(data=DataKeys('stars.csv'))) is None


def test_a_key_that_stands_twice_is_refused():
    assert yaml.load('train: {lr: 1}', _Loader) == {'train': {'lr': 1}}
    with pytest.raises(ValueError, match='seed stands twice, in line 1 and line 4'):
        yaml.load('seed: 1\ntrain:\n  lr: 1\nseed: 2', _Loader)
