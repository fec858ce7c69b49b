"The commands, called as a shell calls them, in a folder of their own."

import json, shutil, sys

import pytest
from typer.testing import CliRunner

from ftbook import cli
from tiny import good_rows, save_tiny_model, tiny_config, write_config, write_rows

command = [sys.executable, "-c", "from ftbook.cli import main; main()"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def desk(tiny, tmp_path, monkeypatch):
    "An empty folder to work in, with a good file of rows and a good configuration."
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", good_rows())
    write_config(tmp_path / "it.yaml", tiny_config(tiny, "rows.jsonl"))
    return tmp_path


def ftbook(*args):
    """Run a command in this process.

    Whatever happens, it must end as a command does: with a code, and without a traceback.
    """
    done = CliRunner().invoke(cli.app, [str(a) for a in args], prog_name="ftbook")
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.output
    return done


# Runs, in processes of their own


def same_result(a, b):
    "Do two runs have the same adapter, to the byte, and the same findings?"
    read = lambda o: (o / "adapter/adapter_model.safetensors").read_bytes()
    facts = lambda o: {
        k: v
        for k, v in json.loads((o / "report.json").read_text()).items()
        if k.startswith(("accuracy", "loss", "steps", "n_", "forgetting", "samples"))
    }
    return read(a) == read(b) and facts(a) == facts(b)


# A bare file


def write_reviews(path, n=60):
    rows = [f"{i},{r['text']},{r['label']}" for i, r in enumerate(good_rows(n))]
    path.write_text("\n".join(["id,review,verdict", *rows]) + "\n")


# A classifier from a few rows


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    from cases.fewshot import save_tiny_encoder

    return save_tiny_encoder(tmp_path_factory.mktemp("encoder"))


# Models into one


@pytest.fixture
def pair(tiny, desk):
    "Two models that differ from a base a little, and a configuration."
    import torch
    from safetensors.torch import load_file, save_file

    for seed, name in enumerate(("red", "blue")):
        shutil.copytree(tiny, desk / name)
        file, generator = desk / name / "model.safetensors", torch.Generator().manual_seed(seed)
        save_file(
            {k: v + 0.01 * torch.randn(v.shape, generator=generator) for k, v in load_file(file).items()},
            file,
            metadata=dict(format="pt"),
        )
    (desk / "both.yaml").write_text(
        
            f"merge_method: task_arithmetic\nbase_model: {tiny}\nmodels:\n- {{model: red, parameters: {{weight: "
            f"0.5}}}}\n- {{model: blue, parameters: {{weight: 0.5}}}}\n"
        
    )
    return desk
