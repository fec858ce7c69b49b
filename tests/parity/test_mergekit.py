"Merging against mergekit: its published configurations, and its merged tensors."

import json, os, shutil

import pytest, torch, yaml

from ftbook.merging.engine import merge
from rivals import variable
from studies.merge_parity import QUESTIONS, parity
from cases.merge import gap, NAMES, source, tensors


# Configurations

EXAMPLES = {  # the shapes of the configurations that mergekit publishes as examples, with other names for the models
    "linear": (
        "models:\n  - model: a\n    parameters:\n      weight: 1.0\n  - model: b\n    parameters:\n      weight: "
        "0.3\nmerge_method: linear\ndtype: float16\n"
    ),
    "ties": (
        "models:\n  - model: a\n    parameters:\n      density: [1, 0.7, 0.1] # density gradient\n      weight: "
        "1.0\n  - model: b\n    parameters:\n      density: 0.5\n      weight: [0, 0.3, 0.7, 1]\n  - model: c\n    "
        "parameters:\n      density: 0.33\n      weight:\n        - filter: mlp\n          value: 0.5\n        - "
        "value: 0\nmerge_method: ties\nbase_model: base\nparameters:\n  normalize: true\n  int8_mask: true\ndtype: "
        "float16\n"
    ),
    "bio": (
        "models:\n  - model: a\n    parameters:\n      density: 0.5\n      weight: 0.5\n  - model: b\n    "
        "parameters:\n      density: 0.5\n      weight: 0.5\nmerge_method: ties\nbase_model: base\nparameters:\n  "
        "normalize: false\n  int8_mask: true\ndtype: float16"
    ),
    "gradient slerp": (
        "slices:\n  - sources:\n      - model: a\n        layer_range: [0, 3]\n      - model: b\n        "
        "layer_range: [0, 3]\nmerge_method: slerp\nbase_model: a\nparameters:\n  t:\n    - filter: self_attn\n     "
        " value: [0, 0.5, 0.3, 0.7, 1]\n    - filter: mlp\n      value: [1, 0.5, 0.7, 0.3, 0]\n    - value: 0.5 # "
        "fallback for rest of tensors\ndtype: float16\n"
    ),
    "44 layers": (
        "slices:\n  - sources:\n    - model: a\n      layer_range: [0, 2]\n  - sources:\n    - model: b\n      "
        "layer_range: [1, 3]\nmerge_method: passthrough\ndtype: float16\n"
    ),
    "fewer layers": (
        "slices:\n  - sources:\n    - model: a\n      layer_range: [0, 2]\nmerge_method: passthrough\ndtype: float16\n"
    ),
    "base listed": (
        "models:\n  - model: a\n    parameters:\n      density: [1, 0.7, 0.1]\n      weight: 1.0\n  - model: "
        "base\n    parameters:\n      density: 0.5\n      weight: [0, 0.3, 0.7, 1]\nmerge_method: "
        "ties\nbase_model: base\nparameters:\n  normalize: true\ndtype: float16"
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_published_examples(name, source, tmp_path):
    for new, old in zip("abc", NAMES[1:]):
        shutil.copytree(source / old, tmp_path / new)
    shutil.copytree(source / "base", tmp_path / "base")
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        done = merge(EXAMPLES[name], "out")
    finally:
        os.chdir(before)
    made = tensors(tmp_path / "out")
    assert all(t.dtype == torch.float16 for t in made.values())
    layers = {"44 layers": 4, "fewer layers": 2}.get(name, 3)
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == layers
        and len(made) == 2 + 9 * layers
    )
    if name == "44 layers":
        assert torch.equal(
            made["model.layers.2.mlp.up_proj.weight"],
            tensors(source / "blue")["model.layers.1.mlp.up_proj.weight"].half(),
        )
    if name == "gradient slerp":
        assert torch.equal(
            made["model.layers.0.self_attn.q_proj.weight"],
            tensors(source / "red")["model.layers.0.self_attn.q_proj.weight"].half(),
        )
    assert done.plan.recipe.name == yaml.safe_load(EXAMPLES[name])["merge_method"]


# mergekit


def check_runs(runs):
    assert [r["question"] for r in runs] == list(QUESTIONS)
    for r in runs:
        assert r["largest"] <= 1e-6 and r["effect"] > 0.01 and r["tensors"] >= 20 and r["same_configuration"], r


@pytest.mark.skipif(not os.environ.get(variable("mergekit")), reason="no environment with mergekit is named")
def test_parity_with_mergekit():
    check_runs(parity())
