"A recipe for a tiny model."

import json
from dataclasses import asdict

import pytest

from ftbook.recipe import config as recipe_config
from ftbook.recipe import preflight as recipe_preflight
from tiny import good_rows, save_tiny_model, tiny_config, write_rows
from ftbook.problem import Problem


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
    return [(f.where, str(Problem(f.message, f.remedy))) for f in recipe_preflight.check(recipe, out).errors]


# A judge that fails


def same_files(a, b):
    "Have two runs left the same adapter, to the byte, and the same files?"
    files = [sorted(f.name for f in o.iterdir()) for o in (a, b)]
    adapters = [(o / "adapter/adapter_model.safetensors").read_bytes() for o in (a, b)]
    return files[0] == files[1] and adapters[0] == adapters[1]


def bare_facts(**changes):
    "The least that a report can be made of."
    facts = dict(
        accuracy_before=None,
        accuracy_after=None,
        loss_before=1.0,
        loss_after=0.5,
        loss_change=-0.5,
        loss_change_interval=[-0.6, -0.4],
        n_eval=9,
        n_left=0,
        tokens_per_second=1.0,
        peak_memory_bytes=1,
        memory_plan={},
        forgetting={},
        seconds=1.0,
        seconds_by_stage=dict(train=1.0),
        n_train=1,
        train_tokens=1,
        steps=1,
        trained_parameters=1,
        total_parameters=2,
        device="cpu",
        threads=2,
        dtype="float32",
        device_reasons=["r"],
        findings=[],
        history=[dict(step=1, loss=1.0, lr=0.1, eval_loss=None)],
        samples=[],
        recipe=asdict(recipe_config.Recipe()),
        seed=0,
        versions=dict(a="1"),
    )
    return json.loads(json.dumps(facts | changes))
