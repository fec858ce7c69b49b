"A recipe for a tiny model."

import pytest

from ftbook.recipe import config as recipe_config
from ftbook.recipe import preflight as recipe_preflight
from tiny import good_rows, save_tiny_model, tiny_config, write_rows


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make(tiny, tmp_path):
    "A recipe for the tiny model and a file of good rows; sections given are merged into it."
    source = write_rows(tmp_path / "rows.jsonl", good_rows())
    return lambda **sections: recipe_config.make_recipe(tiny_config(tiny, source, **sections))


# The checks


def errors(recipe, out=None):
    return [(f.where, f.message) for f in recipe_preflight.check(recipe, out).errors]


# A judge that fails


def same_files(a, b):
    "Have two runs left the same adapter, to the byte, and the same files?"
    files = [sorted(f.name for f in o.iterdir()) for o in (a, b)]
    adapters = [(o / "adapter/adapter_model.safetensors").read_bytes() for o in (a, b)]
    return files[0] == files[1] and adapters[0] == adapters[1]
