"The recipe's keys, and the arithmetic of its judges."

import inspect, json
from dataclasses import asdict, fields

import yaml
from hypothesis import given, settings, strategies as st

from cases.recipe import bare_facts
from ftbook.forgetting import lost as forgetting_lost
from ftbook.recipe import config as recipe_config
from ftbook.recipe import job as recipe_job
from ftbook.recipe import judge as recipe_judge
from ftbook.recipe import report as recipe_report
from ftbook.training.settings import Settings
from ftbook.training.tune import finetune


# The configuration


def test_finetune_takes_every_setting_by_name():
    known = inspect.signature(finetune).parameters
    own = ["model", "examples", "eval_examples", "settings", "out", "resume", "callbacks", "progress"]
    assert list(known)[:8] == own and list(known)[-1] == "changes"
    assert list(known)[8:-1] == [f.name for f in fields(Settings)]
    assert all(known[f.name].default == f.default for f in fields(Settings))


def test_the_keys_of_train_are_the_settings():
    keys = {k["key"].removeprefix("train.") for k in recipe_config.list_keys() if k["key"].startswith("train.")}
    assert keys == {f.name for f in fields(Settings)} - {"regularizer"}


def test_a_section_that_is_left_out_has_its_defaults():
    recipe = recipe_config.make_recipe(dict(data=dict(source="reviews.csv")))
    assert recipe.evaluate == recipe_config.EvaluateKeys()
    assert recipe.forgetting == recipe_config.ForgettingKeys()


def test_method_keys_are_the_arguments_of_the_methods():
    only_in_python = {
        "seed",
        "tokenizer",
        "layers_pattern",
        "activation",
        "scaling",
        "init_std",
        "layout",
        "feedforward_modules",
        "projection",
        "encoder_hidden_size",
        "kind",
    }
    classes = [cls for cls, *_ in recipe_config.METHODS.values() if cls]
    assert {f.name for f in fields(recipe_config.MethodKeys)} - {"type"} == {
        f.name for cls in classes for f in fields(cls)
    } - only_in_python
    for f in fields(recipe_config.MethodKeys):
        for own in [o for cls in classes for o in fields(cls) if o.name == f.name and f.default is not None]:
            assert own.default == f.default, f.name


def test_defaults_obey_their_own_rules():
    found = recipe_config.make_recipe(yaml.safe_load(recipe_config.recipe_yaml(recipe_config.Recipe())))
    assert found == recipe_config.Recipe()


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda o: st.lists(o, max_size=3) | st.dictionaries(st.text(max_size=5), o, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([k["key"] for k in recipe_config.list_keys()]), junk, max_size=4))
@settings(max_examples=200, deadline=None)
def test_any_values_make_a_recipe_or_a_message(given):
    tree = {}
    for key, value in given.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    try:
        made = recipe_config.make_recipe(tree)
    except ValueError as e:
        assert any(k in str(e) for k in given)
    else:
        assert recipe_config.make_recipe(yaml.safe_load(recipe_config.recipe_yaml(made))) == made
        recipe_config.contradiction(made)


def test_paths_start_from_the_file(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/it.yaml").write_text(
        "data: {source: rows.jsonl, test_source: movie}\nforgetting: {texts: [newspaper, other.csv]}"
    )
    made = recipe_config.load_recipe(tmp_path / "there/it.yaml")
    assert made.data.source == str(tmp_path / "there/rows.jsonl") and made.data.test_source == "movie"
    assert made.forgetting.texts == ["newspaper", str(tmp_path / "there/other.csv")]


# Judging


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_solves_its_equation(kn):
    k, n = kn
    low, high = recipe_judge.wilson(k, n)
    assert -1e-9 <= low <= k / n + 1e-9 and k / n - 1e-9 <= high <= 1 + 1e-9
    for p in (low, high):
        assert abs(abs(k / n - p) - 1.959964 * (max(p * (1 - p), 0) / n) ** 0.5) < 1e-6


def test_the_bootstrap_agrees_with_theory():
    import numpy as np

    rng = np.random.default_rng(0)
    before = rng.normal(0, 1, 500)
    after = before + rng.normal(0.1, 0.3, 500)
    change, low, high = forgetting_lost.paired_bootstrap(before, after)
    d = after - before
    assert abs((high - low) - 2 * 1.96 * d.std() / 500**0.5) < 0.006 and abs(change - d.mean()) < 1e-12


# The run


def test_slots_are_shown():
    html = recipe_report.Report(
        bare_facts(), audit=["AUDIT"], plan=["PLAN"], preflight=["PREFLIGHT"], forgetting=["BATTERY"]
    ).html()
    assert all(word in html for word in ("AUDIT", "PLAN", "PREFLIGHT", "BATTERY"))
    cost = recipe_report.Report(bare_facts()).cost()
    assert "parameters trained" in cost.html and "AUDIT" not in cost.html


# What the report says to do


def test_every_method_of_a_recipe_has_a_module_that_load_adapter_imports():
    from ftbook.methods.protocol import HOMES

    assert {cls.peft_type: cls.__module__ for cls, *_ in recipe_config.METHODS.values() if cls} == HOMES


# A judge that fails
