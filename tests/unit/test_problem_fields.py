"""Errors of every package have their place, their reason and their remedy as fields.

Each case is what is called, and what it says of file, row, key and remedy; the remedy is given by its beginning. A path
that begins with FOLDER is in the test's own folder."""

import json

import numpy as np
import pytest
import torch

from ftbook.choose.recommend import recommend
from ftbook.choose.settings import choose_settings
from ftbook.data.columns import find_text_column, pick_columns
from ftbook.data.encoding import encode, to_example
from ftbook.data.layouts import laid
from ftbook.data.packs import length_batches, pack
from ftbook.data.read import read_rows
from ftbook.data.rows import classification_row, row_parts
from ftbook.data.split import split_rows
from ftbook.fewshot.exchange import load_classifier, load_setfit
from ftbook.fewshot.rows import make_shots
from ftbook.fewshot.tuning import Tuning
from ftbook.forgetting.remedies import replay, Spring
from ftbook.forgetting.sequences import transfer
from ftbook.memory.advice import advise
from ftbook.memory.plan import plan
from ftbook.memory.step import small_config, small_model
from ftbook.memory.tricks import checkpoint_
from ftbook.merging.config import read_config
from ftbook.merging.states import merge_states
from ftbook.methods.files import load_adapter, read_adapter_tensors, read_method, save_adapter
from ftbook.methods.lora_method import LoRA
from ftbook.methods.prompt_tuning import PromptTuning
from ftbook.methods.quant import quantize_
from ftbook.methods.targets import find_modules
from ftbook.models.load import as_dtype, check_weights, embed, load_model, load_tokenizer
from ftbook.problem import Problem
from ftbook.quality.audit import audit
from ftbook.quality.classes import class_codes
from ftbook.quality.cleaning import write_clean
from ftbook.quality.datatrove import Executor
from ftbook.quality.duplicates import find_duplicates
from ftbook.quality.findings import view_rows
from ftbook.quality.minhash import minhash
from ftbook.scale import sharded_bytes
from ftbook.training.evaluate import evaluate
from ftbook.training.launch import check_config
from ftbook.training.settings import Settings


def told(call):
    "The problem that a call raises."
    with pytest.raises(Problem) as found:
        call()
    return found.value


def check(call, file=None, row=None, key=None, remedy=''):
    "Raises if the problem of a call is at another place, or has another remedy."
    problem = told(call)
    place = problem.where
    assert (place.file and str(place.file), place.row, place.key) == (file and str(file), row, key), problem
    assert problem.remedy.startswith(remedy) and bool(problem.remedy) == bool(remedy), problem.remedy
    assert problem.why and json.dumps(problem.as_dict())


@pytest.fixture(scope='module')
def tokenizer():
    return load_tokenizer('smollm2-135m')


reviews = [dict(review=f'film {i} is fine', stars=i % 3, id=i) for i in range(9)]
no_network = dict(layer=torch.ones(2))

AT_ARGUMENTS = {
    'a precision': (lambda: as_dtype('int4'), 'dtype', ''),
    'a model': (lambda: load_model('no-such-model'), 'name', 'Shipped with ftbook'),
    'a column': (lambda: find_text_column(reviews, 'body'), 'body', ''),
    'a label': (lambda: pick_columns([dict(text='fine')]), 'label_column', ''),
    'an answer': (lambda: classification_row('a', 'c', '{labels}?', ['a', 'b']), 'label', ''),
    'a way': (lambda: laid(dict(attention_mask=torch.ones(1, 2)), 'up'), 'way', ''),
    'a batch': (lambda: length_batches([], 0), 'batch_size', ''),
    'a test': (lambda: split_rows(reviews, 9, key='review'), 'n_test', ''),
    'a column of an audit': (lambda: audit(reviews, text_column='body', encoder=None), 'body', ''),
    'an executor': (lambda: Executor('cloud'), 'kind', ''),
    'labels': (lambda: find_duplicates(['a', 'b'], labels=['x']), 'labels', ''),
    'a rank': (lambda: LoRA(rank=0), 'rank', ''),
    'a rank for a layer': (lambda: LoRA(rank=999).apply(small_model(2)), 'rank', 'choose a rank up to 128'),
    'an init': (lambda: LoRA(init='zero'), 'init', "choose 'kaiming'"),
    'targets': (lambda: find_modules(small_model(2), 'nothing'), 'target_modules', 'These would match'),
    'a pattern': (lambda: LoRA(rank_pattern=dict(no=2)).apply(small_model(2)), 'rank_pattern', ''),
    'a text': (lambda: PromptTuning(2, text='a', init='text'), 'tokenizer', 'give it, or give token ids'),
    'a kind': (lambda: quantize_(small_model(2), 'nf3'), 'kind', 'choose nf4'),
    'a setting': (lambda: Settings(lr=-1), 'lr', ''),
    'examples': (lambda: evaluate(small_model(2), []), 'examples', ''),
    'devices': (lambda: sharded_bytes({}, 0, 'ddp'), 'n_devices', ''),
    'memory': (lambda: advise(small_config(2), memory_gib=-1), 'memory_gib', ''),
    'free memory': (lambda: recommend(reviews, memory_gib=-1, device='cpu'), 'memory_gib', ''),
    'a length': (lambda: plan(small_config(2), seq_len=1), 'seq_len', ''),
    'a part': (lambda: checkpoint_(small_model(2), only='head'), 'only', ''),
    'a loss': (lambda: Tuning(loss='cosine'), 'loss', ''),
    'two labels': (lambda: make_shots(['a', 'b'], ['x', 'X ']), 'labels', 'mend them'),
    'a strength': (lambda: Spring(small_model(2), -1), 'strength', ''),
    'old rows': (lambda: replay([1, 2], [], 0.5), 'old', ''),
    'a merge method': (lambda: merge_states('ties2', None, []), 'merge_method', ''),
    'a density': (lambda: merge_states('ties', no_network, [no_network] * 2, density=2.0, weight=1.0), 'density', ''),
    'a key of a merge': (lambda: read_config(dict(merge_method='linear', densitty=1)), 'densitty', ''),
    'a model twice': (
        lambda: read_config(dict(merge_method='linear', models=[dict(model='a')] * 2)),
        'model',
        'give it the sum of the weights',
    ),
    'a price': (lambda: choose_settings(None, price=-1), 'price', ''),
}


@pytest.mark.parametrize('name', AT_ARGUMENTS)
def test_an_argument_or_a_column_is_the_key(name):
    call, key, remedy = AT_ARGUMENTS[name]
    check(call, key=key, remedy=remedy)


AT_ROWS = {
    'a row that is none': (lambda: row_parts('text', 7), 7, None, ''),
    'an empty answer': (lambda: row_parts(dict(prompt='a', completion=''), 3), 3, 'completion', ''),
    'messages': (lambda: row_parts(dict(messages='Hi'), 0), 0, 'messages', ''),
    'a field': (lambda: read_rows([dict(a=1), dict(b=1)], need=['a']), 1, 'a', ''),
    'a label': (lambda: class_codes(['a', 1]), 1, None, 'write all labels as one type'),
    'a text': (lambda: find_duplicates(['a', None]), 1, None, ''),
    'a text to embed': (lambda: embed(None, None, ['a', 3]), 1, None, ''),
    'a shot': (lambda: make_shots(['a', ' '], ['x', 'y']), 1, None, 'leave the row out'),
    'a set': (lambda: minhash([{1}, set()]), 1, None, ''),
    'a score': (lambda: transfer(np.array([[1, 1], [1, np.nan], [1, 1]])), 1, 'scores', ''),
}


@pytest.mark.parametrize('name', AT_ROWS)
def test_rows_are_counted_from_0(name):
    call, row, key, remedy = AT_ROWS[name]
    check(call, row=row, key=key, remedy=remedy)


def test_an_encoded_row_is_named_by_whoever_knows_its_number(tokenizer):
    empty = dict(prompt='a', completion=' ')
    check(lambda: to_example(empty, tokenizer), key='completion')
    check(lambda: to_example(empty, tokenizer, index=5), row=5, key='completion')
    check(lambda: encode([dict(text='fine'), empty], tokenizer), row=1, key='completion')
    ((i, problem),) = encode([dict(text='fine'), empty], tokenizer, bad_rows='skip').refused
    assert (i, problem.where.row, problem.where.key) == (1, 1, 'completion')
    check(lambda: encode([empty] * 2, tokenizer, bad_rows='skip'), row=0, key='completion')
    check(lambda: pack([to_example(dict(text='a b c d e'), tokenizer, index=2)], 2), row=2, remedy='raise max_tokens')


def write(path, text):
    path.write_text(text, encoding='utf-8')
    return path


def test_a_file_of_rows_is_named(tmp_path):
    check(lambda: read_rows(tmp_path), tmp_path, remedy='name one of its files')
    for name, text, row in (
        ('broken.jsonl', '{"a": 1}\n{', None),
        ('list.jsonl', '{"a": 1}\n\n3', 1),
        ('wide.csv', 'a,b\n1,2\n1,2,3\n', 1),
        ('object.json', '{}', None),
    ):
        path = write(tmp_path / name, text)
        check(lambda: read_rows(path), path, row)
    path = write(tmp_path / 'twice.csv', 'a,a\n1,2\n')
    check(lambda: read_rows(path), path, key='a')
    path = write(tmp_path / 'good.csv', 'text,label\nfine,\n')
    check(lambda: read_rows(path, need=['id']), path, 0, 'id')
    check(lambda: recommend(path, memory_gib=8, device='cpu', encoder=None), path, 0)
    found = audit(path, encoder=None, progress=False)
    assert found.view.unusable == {0: "'label' is empty"}
    check(lambda: write_clean(found, path), path)


def test_a_view_says_which_columns_it_found():
    view = view_rows(reviews)
    assert (view.kind, view.text_column, view.label_column) == ('classification', 'review', 'stars')


def test_a_folder_of_weights_is_named(tmp_path):
    write(tmp_path / 'pytorch_model.bin', 'never opened')
    check(lambda: check_weights(tmp_path), tmp_path, remedy='ask for a safetensors version')
    path = tmp_path / 'model.safetensors'
    path.write_bytes(b'never')
    check(lambda: check_weights(tmp_path), path, remedy='copy or download it again')
    check(lambda: load_setfit(folder_with(tmp_path / 's', 'model_head.pkl')), tmp_path / 's', remedy='If you trust')
    check(lambda: load_classifier(tmp_path), tmp_path)
    with pytest.raises(FileNotFoundError):
        load_classifier(tmp_path / 'nowhere')


def folder_with(folder, name):
    folder.mkdir()
    write(folder / name, '')
    return folder


def test_an_adapter_is_named_with_what_does_not_fit(tmp_path):
    model = LoRA(rank=2).apply(small_model(2))
    folder = save_adapter(model, tmp_path / 'a')
    misfit = told(lambda: load_adapter(small_model(1), folder))
    assert misfit.where.file == folder and misfit.why.startswith('the adapter does not fit this model: the model has')
    config = folder / 'adapter_config.json'
    content = json.loads(config.read_text())
    write(config, json.dumps(content | dict(r=0)))
    check(lambda: read_method(folder), config, key='rank')
    write(config, json.dumps(content | dict(peft_type='NONE')))
    check(lambda: read_method(folder), config, key='peft_type', remedy='A method of your own')
    write(config, '{')
    check(lambda: read_method(folder), config)
    name = next(iter(model.ftbook_added))
    with torch.no_grad():
        model.get_parameter(name).fill_(torch.nan)
    broken = told(lambda: save_adapter(model, tmp_path / 'b'))
    assert broken.where.file == tmp_path / 'b' and 'is not saved' in broken.why and broken.where.key in broken.why
    (folder / 'adapter_model.safetensors').write_bytes(b'short')
    check(lambda: read_adapter_tensors(folder), folder / 'adapter_model.safetensors', remedy='copy it again')


def test_a_configuration_is_named(tmp_path):
    path = write(tmp_path / 'merge.yaml', 'merge_method: linear\nmodels: 3\n')
    check(lambda: read_config(path), path, key='models')
    path = write(tmp_path / 'launch.yaml', 'num_procs: 2\n')
    check(lambda: check_config(path), path)


def test_a_problem_as_plain_values():
    given = dict(file="rows.csv", row=3, key="text", why="it is empty", remedy="fill it")
    assert Problem(given["why"], given["remedy"], file="rows.csv", row=3, key="text").as_dict() == given
