"Errors and private helpers of ftbook.recipe.config."

import json
from dataclasses import fields
from pathlib import Path

import pytest, yaml

import ftbook
from ftbook.keys import nearest_key, Problems
from ftbook.problem import Problem
from ftbook.recipe.config import (
    _Loader,
    contradiction,
    DataKeys,
    foreign_keys,
    list_keys,
    load_recipe,
    make_recipe,
    MethodKeys,
    METHODS,
    ModelKeys,
    own_keys,
    Recipe,
    recipe_schema,
    recipe_yaml,
    SCHEMA_URL,
)
from ftbook.training.settings import Settings


@pytest.mark.parametrize(
    'given, says',
    [
        ({'method': {'rank': 0}}, 'method.rank must be a whole number, 1 or more, not 0'),
        ({'train': {'lr': 'fast'}}, "train.lr must be a number or null, above 0, not 'fast'"),
        ({'method': {'type': 'qlora'}}, f"method.type must be text, one of {', '.join(METHODS)}, not 'qlora'"),
        ({'data': {'labels': [True, False]}}, 'put them in quotes'),
        ({'train': {'regularizer': 'x'}}, 'train.regularizer must be a function, which only Python can give'),
        ({1: 2}, 'unknown key 1'),
    ],
)
def test_a_complaint_names_key_value_and_what_is_wanted(given, says):
    with pytest.raises(Problem) as e:
        make_recipe(given)
    assert says in str(e.value)


def test_all_wrong_keys_of_a_file_are_told_at_once(tmp_path):
    (tmp_path / 'it.yaml').write_text('method: {rnak: 8, alpha: x}\ntrain: {lr: -1}\ndata: 3\nsede: 1\n')
    with pytest.raises(Problems) as e:
        load_recipe(tmp_path / 'it.yaml')
    keys = [problem.where.key for problem in e.value.found]
    assert sorted(keys) == ['data', 'method.alpha', 'method.rnak', 'sede', 'train.lr']
    assert {problem.where.file for problem in e.value.found} == {tmp_path / 'it.yaml'}
    assert 'did you mean method.rank?' in str(e.value) and 'did you mean seed or train.seed?' in str(e.value)


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
    assert nearest_key(written, Recipe) == meant


def test_keys_of_another_method():
    assert foreign_keys(MethodKeys('houlsby', bottleneck_size=8)) is None
    full = foreign_keys(MethodKeys('full', rank=8))
    assert (full.why, full.remedy) == ('method.rank does not belong to method.type full', 'It has no other keys')
    said = foreign_keys(MethodKeys('prompt', rank=8, use_dora=True))
    assert said.why.startswith('method.rank, method.use_dora do not belong to method.type prompt')
    assert said.where.key == 'method.rank'
    assert set(own_keys('houlsby')) >= {'dropout', 'bottleneck_size'} and 'rank' not in own_keys('houlsby')


def test_cuts_want_a_label_more_than_they_are():
    cut = contradiction(Recipe(data=DataKeys('stars.csv', cuts=[-1, 1], labels=['poor', 'good'])))
    assert cut.why == 'data.cuts has 2 cuts, so data.labels must name 3 labels, not 2' and 'leaves rows out' in cut.remedy
    assert contradiction(Recipe(data=DataKeys('stars.csv'))) is None


@pytest.mark.parametrize(
    'train, dtype, wrong',
    [
        (dict(mixed=True, precision='float32'), None, True),
        (dict(mixed=False, precision='bfloat16'), 'float32', True),
        (dict(precision='float32'), 'bfloat16', True),
        (dict(mixed=False, precision='bfloat16'), None, False),
        (dict(precision='bfloat16'), 'float32', False),
        (dict(mixed=True), 'bfloat16', False),
    ],
)
def test_precisions_that_contradict_one_another(train, dtype, wrong):
    recipe = Recipe(data=DataKeys('stars.csv'), model=ModelKeys(dtype=dtype), train=Settings(**train))
    found = contradiction(recipe)
    assert (found is not None) == wrong and (not wrong or found.where.key == 'train.precision')


def test_a_function_has_no_place_in_a_recipe():
    recipe = Recipe(data=DataKeys('stars.csv'), train=Settings(optimizer=print))
    assert contradiction(recipe).where.key == 'train.optimizer'


def test_a_key_that_stands_twice_is_refused():
    assert yaml.load('train: {lr: 1}', _Loader) == {'train': {'lr': 1}}
    with pytest.raises(ValueError, match='seed stands twice, in line 1 and line 4'):
        yaml.load('seed: 1\ntrain:\n  lr: 1\nseed: 2', _Loader)


# The schema


def test_the_shipped_schema_is_fresh():
    shipped = Path(ftbook.__file__).parent / 'assets/recipe.schema.json'
    assert json.loads(shipped.read_text()) == recipe_schema(), 'ftbook keys --schema > ftbook/assets/recipe.schema.json'


def test_the_schema_has_every_key_with_help_and_default():
    schema = recipe_schema()
    assert schema['$id'] == SCHEMA_URL
    told = {}
    for name, part in schema['properties'].items():
        inner = schema['$defs'][part['$ref'].rpartition('/')[2]] if '$ref' in part else None
        told |= {f'{name}.{k}': v for k, v in inner['properties'].items()} if inner else {name: part}
        assert inner is None or inner['additionalProperties'] is False
    assert list(told) == [k['key'] for k in list_keys()]
    assert all(k['help'].startswith(told[k['key']]['description']) and k['help'] for k in list_keys())
    assert not any('None' in v['description'] for v in told.values())
    assert 'train.regularizer' not in told and {f.name for f in fields(Settings)} - {'regularizer'} == {
        k.partition('.')[2] for k in told if k.startswith('train.')
    }


def test_the_schema_takes_what_ftbook_writes_and_refuses_what_it_refuses():
    jsonschema = pytest.importorskip('jsonschema')
    jsonschema.Draft202012Validator.check_schema(recipe_schema())
    judge = jsonschema.Draft202012Validator(recipe_schema())
    written = recipe_yaml(Recipe(data=DataKeys('stars.csv', labels=['a', None], cuts=[1.0])))
    assert written.startswith(f'# yaml-language-server: $schema={SCHEMA_URL}\n')
    assert judge.is_valid(yaml.safe_load(written))
    for wrong in ({'method': {'rnak': 8}}, {'train': {'lr': -1}}, {'sede': 1}, {'model': {'dtype': 'bf16'}}, {'data': 3}):
        assert not judge.is_valid(wrong), wrong
        with pytest.raises(Problem):
            make_recipe(wrong)
