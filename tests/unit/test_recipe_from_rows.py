"What a bare file says about itself, and what is refused."

import csv, json
from dataclasses import asdict
from pathlib import Path

import pytest, yaml

from ftbook.recipe.config import load_recipe, Recipe
from ftbook.recipe.from_rows import find_data_keys, goes_on, read_recipe, run_folder

reviews = [
    dict(id=n, source='web', review=f'the film number {n} was so and so', verdict=['bad', 'good'][n % 2])
    for n in range(20)
]


def write(path):
    "The reviews in the format that the ending of the name says."
    if path.suffix == '.csv':
        with open(path, 'w', newline='') as f:
            csv.writer(f).writerows([list(reviews[0]), *(r.values() for r in reviews)])
    elif path.suffix == '.jsonl':
        path.write_text('\n'.join(map(json.dumps, reviews)))
    else:
        import pyarrow as pa, pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(reviews), path)
    return path


@pytest.mark.parametrize('ending', ['csv', 'jsonl', 'parquet'])
def test_every_format_gives_the_same_recipe(tmp_path, ending):
    made = read_recipe(write(tmp_path / f'reviews.{ending}'))
    found = dict(
        source=str((tmp_path / f'reviews.{ending}').resolve()),
        shape='classification',
        text_column='review',
        label_column='verdict',
        labels=['bad', 'good'],
    )
    assert asdict(made) == asdict(Recipe()) | dict(data=asdict(Recipe().data) | found)


@pytest.mark.parametrize(
    'rows, given, found',
    [
        ([dict(messages=[], text='a')], {}, dict(shape='messages')),
        ([dict(prompt='a', completion='b', label='c')] * 4, {}, dict(shape='prompt_completion')),
        ([dict(term='a', definition='b')], {}, {}),
        ([dict(line=f'a line of text {n}') for n in range(9)], {}, dict(shape='text', text_column='line')),
        ([dict(text=f'a {n}', id=n) for n in range(9)], {}, dict(shape='text', text_column='text')),
        (reviews, dict(shape='text'), dict(shape='text', text_column='review')),
        (
            reviews,
            dict(label_column='source'),
            dict(shape='classification', text_column='review', label_column='source', labels=['web']),
        ),
        (
            [dict(body=f'a film, number {n}', stars=n / 7) for n in range(60)],
            dict(label_column='stars', cuts=[2.0], labels=['bad', 'good']),
            dict(shape='classification', text_column='body', label_column='stars'),
        ),
    ],
)
def test_rows_say_what_they_are(rows, given, found):
    assert find_data_keys(rows, given) == found


@pytest.mark.parametrize(
    'rows, given, says',
    [
        ([dict(question=f'what is {n}?', answer=f'it is {n}') for n in range(9)], {}, 'no column looks like a label'),
        ([dict(text=f'film {n}', label=n / 7) for n in range(60)], {}, "'label' has 60 different values"),
        ([dict(a='3.5', b='4')] * 4, {}, 'holds no text but numbers or nothing'),
        (reviews, dict(text_column='body'), "no column 'body'; there are 'id', 'source', 'review', 'verdict'"),
        (reviews, dict(label_column='stars'), "no column 'stars'"),
    ],
)
def test_what_cannot_be_told_is_refused(tmp_path, rows, given, says):
    with pytest.raises(ValueError) as e:
        find_data_keys(rows, given)
    assert says in str(e.value)
    (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    with pytest.raises(ValueError) as e:
        read_recipe(tmp_path / 'rows.jsonl', data=given)
    assert says in str(e.value) and 'rows.jsonl' in str(e.value)


def test_every_kind_of_source_is_the_same_recipe(tmp_path):
    file = write(tmp_path / 'reviews.csv')
    made = read_recipe(file, train=dict(epochs=2), seed=3)
    assert (made.train.epochs, made.seed) == (2, 3)
    (tmp_path / 'it.yaml').write_text(yaml.safe_dump(asdict(made)))
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run/recipe.yaml').write_text(yaml.safe_dump(asdict(made)))
    for source in (made, asdict(made), tmp_path / 'it.yaml', str(tmp_path / 'it.yaml'), tmp_path / 'run'):
        assert read_recipe(source) == made
        assert read_recipe(source, train=dict(epochs=4)).train.epochs == 4
    assert made.train.epochs == 2, 'a recipe that is given is not changed'


def test_names_of_files_start_where_they_are_given(tmp_path, monkeypatch):
    write(tmp_path / 'reviews.csv')
    (tmp_path / 'model').mkdir()
    monkeypatch.chdir(tmp_path)
    made = read_recipe('reviews.csv', data=dict(test_source='held.csv'), model=dict(name='model'))
    assert made.data.source == str(tmp_path / 'reviews.csv') and made.data.test_source == str(tmp_path / 'held.csv')
    assert made.model.name == str(tmp_path / 'model')
    (tmp_path / 'there').mkdir()
    (tmp_path / 'there/recipe.yaml').write_text(yaml.safe_dump(asdict(made)))
    monkeypatch.chdir(tmp_path / 'there')
    assert load_recipe('recipe.yaml') == made


@pytest.mark.parametrize(
    'source, changes, error, says',
    [
        ('gone.csv', {}, FileNotFoundError, 'there is no file'),
        ('gone.yaml', {}, FileNotFoundError, 'there is no configuration gone.yaml'),
        ('reviews.csv', dict(train=dict(epocks=2)), ValueError, 'did you mean train.epochs?'),
        ('reviews.csv', dict(data=3), ValueError, 'data must be a section'),
        ({'trian': {}}, {}, ValueError, 'unknown key trian'),
        ([1, 2], {}, TypeError, 'not by a list'),
        (None, {}, TypeError, 'not by a NoneType'),
    ],
)
def test_a_source_that_cannot_be_read_is_named(tmp_path, monkeypatch, source, changes, error, says):
    monkeypatch.chdir(tmp_path)
    write(Path('reviews.csv'))
    with pytest.raises(error) as e:
        read_recipe(source, **changes)
    assert says in str(e.value)


def test_where_a_run_goes(tmp_path):
    made = read_recipe(write(tmp_path / 'reviews.csv'))
    assert [run_folder(o) for o in ('a/mine.yaml', Path('mine.csv'), made)] == [
        Path('ftbook-runs/mine'),
        Path('ftbook-runs/mine'),
        Path('ftbook-runs/reviews'),
    ]
    assert run_folder(tmp_path) == tmp_path and run_folder(tmp_path, 'other') == Path('other')
    assert goes_on(tmp_path) and not goes_on(tmp_path, 'other') and not goes_on(made)
