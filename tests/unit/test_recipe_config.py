"Errors and private helpers of ftbook.recipe.config."

from fastcore.test import test_eq as check_eq, test_fail as check_fail, test_is as check_is
import tempfile
from pathlib import Path

import yaml

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
    load_recipe,
    MethodKeys,
    METHODS,
    Recipe,
    TrainKeys,
)


def test_in_words_1():
    check_eq(_in_words(float | None), 'a number or null')
    check_eq(_in_words(list[str | int]), 'a list of (text or a whole number)')
    check_eq(_in_words(dict[str, int]), 'names with a whole number each')


def test_as_1():
    check_eq(_as(float, '1e-3'), 0.001)
    check_eq(_as(list[str | int | None], ['a', None, 1]), ['a', None, 1])
    check_eq(_as(dict[str, int] | None, {'q_proj': 4}), {'q_proj': 4})
    for kind, value in (int, True), (str, False), (float, 'fast'), (list[str], 'one'), (int, 2.5):
        check_fail(_as, args=(kind, value), exc=TypeError)


def test_checked_1():
    def complaint(path, value):
        section, name = path.split('.')
        kind = {'train': TrainKeys, 'method': MethodKeys, 'data': DataKeys}[section]
        try:
            _checked(path, _hints(kind)[name], value)
        except ValueError as e:
            return str(e)


def test_complaint_1():
    def complaint(path, value):
        section, name = path.split('.')
        kind = {'train': TrainKeys, 'method': MethodKeys, 'data': DataKeys}[section]
        try:
            _checked(path, _hints(kind)[name], value)
        except ValueError as e:
            return str(e)

    check_eq(complaint('method.rank', 0), 'method.rank must be a whole number, 1 or more, not 0')
    check_eq(complaint('train.lr', 'fast'), "train.lr must be a number or null, above 0, not 'fast'")
    check_eq(complaint('method.type', 'qlora'), f"method.type must be text, one of {', '.join(METHODS)}, not 'qlora'")
    complaint('data.labels', [True, False])


def test_nearest_1():
    check_eq(
        [_nearest(k) for k in ('method.rnak', 'lr', 'train.max_step', 'data.rank', 'xyzzy')],
        ['method.rank', 'train.lr', 'train.max_steps', 'method.rank', ''],
    )


def test_foreign_keys_1():
    check_is(foreign_keys(MethodKeys('houlsby', bottleneck_size=8)), None)
    check_eq(
        foreign_keys(MethodKeys('full', rank=8)),
        'method.rank does not belong to method.type full, which has no other keys',
    )
    foreign_keys(MethodKeys('prompt', rank=8, use_dora=True))


def test_recipe_1():
    cut = Recipe(data=DataKeys('stars.csv', cuts=[-1, 1], labels=['poor', 'good']))
    check_eq(
        _contradiction(cut), 'data.cuts has 2 cuts, so data.labels must name 3 labels, not 2; a null leaves rows out'
    )
    check_eq(_contradiction(Recipe(data=DataKeys('stars.csv'))), None)


def test_cell_1():
    check_eq(yaml.load('train: {lr: 1}', _Loader), {'train': {'lr': 1}})
    check_fail(
        lambda: yaml.load('seed: 1\ntrain:\n  lr: 1\nseed: 2', _Loader),
        contains='seed stands twice, in line 1 and line 4',
    )


def test_load_recipe_1():
    folder = tempfile.TemporaryDirectory()
    desk = Path(folder.name)
    (desk / 'broken.yaml').write_text('data: {source: movie\ntrain: 3')
    check_fail(lambda: load_recipe(desk / 'broken.yaml'), contains='broken.yaml is not YAML')
    check_fail(lambda: load_recipe(desk / 'gone.yaml'), contains='there is no configuration')
