"What the commands promise: help, JSON alone on standard output, and the same result as the function's."

import json, re, subprocess
from pathlib import Path

import pytest

from ftbook import cli
from ftbook.models import shipped as models_shipped
from ftbook.recipe import config as recipe_config
from ftbook.recipe import run as recipe_run
from tiny import tiny_config, write_rows
from cases.cli import command, desk, encoder, ftbook, pair, same_result, tiny, write_reviews


# The shape of a command


@pytest.mark.parametrize(
    "name", ["", "quickstart", "train", "check", "keys", "audit", "plan", "recommend", "fewshot", "merge", "models"]
)
def test_help(name):
    done = ftbook(*[name] * bool(name), "--help")
    assert done.exit_code == 0 and done.stdout.startswith(f"Usage: ftbook {name}".strip())
    if name:
        assert "--json" in done.stdout and "--debug" in done.stdout


@pytest.mark.parametrize("name", ["train", "check"])
def test_help_shows_every_key(name):
    told = " ".join(ftbook(name, "--help").stdout.split())
    for key in recipe_config.list_keys():
        assert key["key"] in told and " ".join(key["help"].split()) in told, key["key"]


def test_version():
    from ftbook import __version__

    assert ftbook("--version").stdout.split() == [__version__]


def test_the_script_runs_the_commands(monkeypatch, capsys):
    from ftbook import __version__

    monkeypatch.setattr("sys.argv", ["ftbook", "--version"])
    with pytest.raises(SystemExit) as e:
        cli.main()
    assert e.value.code == 0 and capsys.readouterr().out.split() == [__version__]


def test_nothing_heavy_is_loaded_for_help():
    done = subprocess.run(
        [
            *command[:2],
            (
                "import sys; from ftbook.cli import app\ntry: app(['--help'])\nfinally: print({'torch', "
                "'transformers', 'yaml', 'numpy'} & set(sys.modules))"
            ),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.endswith("set()\n"), done.stdout


def test_models():
    told = json.loads(ftbook("models", "--json").stdout)
    assert [m["name"] for m in told["models"]] == list(models_shipped.SHIPPED) and told["reasons"]
    shown = ftbook("models").stdout
    assert all(m["name"] in shown for m in told["models"]) and told["reasons"][0] in shown


# Runs, in processes of their own


def test_what_a_person_sees(desk):
    done = ftbook("train", "it.yaml", "--out", "here")
    assert done.exit_code == 0 and done.stdout.splitlines()[-2:] == [
        "report   here/report.html",
        "adapter  here/adapter",
    ]
    assert re.search(r"^[\d.]+% right before, [\d.]+% after, on 20 held-out rows; gain ", done.stdout, re.M)
    again = ftbook("train", "here", "--resume")
    assert again.exit_code == 0 and again.stdout == done.stdout and "this run has ended" in again.stderr


# A bare file


def settings(config):
    "The same configuration as options of a command."
    return [
        o
        for section, keys in config.items()
        for key, value in keys.items()
        for o in ("--set", f"{section}.{key}={json.dumps(value)}")
    ]


def test_a_bare_file_is_trained_as_by_the_function(desk, tiny):
    write_reviews(desk / "reviews.csv")
    config = tiny_config(tiny, "", evaluate=dict(samples=0), forgetting=dict(measure=False))
    del config["data"]["source"]
    checked = ftbook("check", "reviews.csv", *settings(config))
    assert checked.exit_code == 0 and "60 rows read; 40 to train on, 20 to judge by" in checked.stdout
    done = ftbook("train", "reviews.csv", *settings(config))
    assert done.exit_code == 0 and done.stdout.splitlines()[-2:] == [
        "report   ftbook-runs/reviews/report.html",
        "adapter  ftbook-runs/reviews/adapter",
    ]
    ours = Path("ftbook-runs/reviews")
    assert all(line in done.stderr for line in (ours / "recipe.yaml").read_text().splitlines())
    other = recipe_run.run("reviews.csv", "other", progress=False, **config)
    assert same_result(ours, other.folder)
    assert (ours / "recipe.yaml").read_bytes() == (other.folder / "recipe.yaml").read_bytes()
    again = ftbook("train", "ftbook-runs/reviews", "--json")
    assert again.exit_code == 0 and json.loads(again.stdout) == json.loads((ours / "report.json").read_text())
    assert ftbook("train", "reviews.csv", *settings(config)).exit_code == 1


# The audit


def audited(desk, *args):
    rows = [
        dict(text=f"A film about the {n}th summer of a long war.", label="fine" if n % 2 else "dull") for n in range(12)
    ]
    write_rows(
        desk / "films.jsonl", [*rows, rows[3], dict(text="Dear {{ name }},", label="dull"), dict(text="", label="fine")]
    )
    return ftbook("audit", "films.jsonl", "--encoder", "none", *args)


def test_an_audit_writes_a_report_and_leaves_the_rows_alone(desk):
    done = audited(desk, "--out", "out")
    assert done.exit_code == 0 and "duplicates.exact: 1 row" in done.stdout and "form.residue" in done.stdout
    assert sorted(f.name for f in (desk / "out").iterdir()) == ["findings.json", "findings.parquet", "report.html"]
    before = (desk / "films.jsonl").read_bytes()
    cleaned = audited(desk, "--clean")
    assert cleaned.exit_code == 0 and (desk / "films.jsonl").read_bytes() == before
    kept, left = ((desk / f"films.{name}.jsonl").read_text().splitlines() for name in ("clean", "left_out"))
    assert len(kept) + len(left) == 15 and [json.loads(l)["row"] for l in left] == sorted(
        json.loads(l)["row"] for l in left
    )


def test_an_audit_for_programs(desk):
    told = json.loads(audited(desk, "--json").stdout)
    assert told["rows"] == 15 and {f["where"] for f in told["findings"]} >= {
        "form.unusable",
        "duplicates.exact",
        "form.residue",
    }
    assert audited(desk, "--strict").exit_code == 1  # there is an error among the findings


def test_held_out_rows_and_benchmarks_are_looked_for(desk):
    write_rows(desk / "held.jsonl", [dict(text="a film about the 3th summer of a LONG war", label="fine")])
    (desk / "texts.txt").write_text("A film about the 5th summer of a long war.\n")
    found = {
        f["where"]: f["rows"]
        for f in json.loads(audited(desk, "--json", "--test", "held.jsonl", "--benchmarks", "texts.txt").stdout)[
            "findings"
        ]
    }
    assert (
        found["leakage.benchmark"] == 1
        and sum(n for where, n in found.items() if where in ("leakage.exact", "leakage.near")) >= 1
    )


def test_a_plan_says_what_fits_and_draws_it(desk, tiny):
    done = ftbook("plan", tiny, "--device", "cpu", "--seq-len", "64")
    assert done.exit_code == 0 and "adapters" in done.stdout and "fits in 24 GiB" in done.stdout
    assert (desk / "ftbook-plans" / f"{Path(tiny).name}.svg").read_text().lstrip().startswith("<svg")
    told, packed = (
        json.loads(ftbook("plan", tiny, "--device", "cpu", "--json", *more).stdout)
        for more in ((), ("--quantize", "nf4"))
    )
    assert told["fits"] and 0 < told["peak"] == sum(told["items"].values()) and packed["items"] != told["items"]


# A classifier from a few rows


def topics(desk, n=8, names=("kitchen", "sea")):
    from cases.fewshot import sentences, write_csv

    return write_csv(desk / "topics.csv", [("text", "label"), *zip(*sentences(n, classes=names))])


def test_fewshot_for_a_person_and_for_a_program(desk, encoder):
    topics(desk)
    done = ftbook("fewshot", "topics.csv", "--shots", "4", "--encoder", encoder)
    assert (
        done.exit_code == 0
        and "% right on the labelled rows that were not trained on" in done.stdout
        and "ftbook-fewshot/topics/report.html" in done.stdout
    )
    folder = desk / "ftbook-fewshot" / "topics"
    assert sorted(f.name for f in folder.iterdir()) == ["model", "next.csv", "report.html", "report.json"]
    facts = json.loads(ftbook("fewshot", "topics.csv", "--encoder", encoder, "--out", "again", "--json").stdout)
    assert facts["folder"] == "again" and facts["n_train"] == 16 and facts["classes"] == ["kitchen", "sea"]


# Models into one


def test_merge_is_the_function(pair):
    from safetensors.torch import load_file
    from ftbook.merging.engine import merge

    planned = json.loads(ftbook("merge", "both.yaml", "--plan", "--json").stdout)
    assert (
        planned["method"] == "task_arithmetic"
        and len(planned["models"]) == 3
        and planned["bytes_written"] > 0
        and not (pair / "ftbook-merges").exists()
    )
    done = ftbook("merge", "both.yaml")
    assert done.exit_code == 0 and "ftbook-merges/both" in done.stdout, done.output
    merge("both.yaml", pair / "other")
    ours, same = (
        load_file(pair / "ftbook-merges" / "both" / "model.safetensors"),
        load_file(pair / "other" / "model.safetensors"),
    )
    assert all(bool((ours[k] == same[k]).all()) for k in same | ours)
    again = ftbook("merge", "both.yaml")
    assert (
        again.exit_code == 1
        and "overwrite" in again.stderr
        and ftbook("merge", "both.yaml", "--overwrite").exit_code == 0
    )


def test_a_merge_says_its_notes_once(pair, tiny):
    (pair / "one.yaml").write_text(
        f"merge_method: task_arithmetic\nbase_model: {tiny}\nmodels:\n- {{model: red, parameters: {{weight: 0.5}}}}\n"
    )
    done = ftbook("merge", "one.yaml")
    assert (
        done.exit_code == 0
        and (done.stdout + done.stderr).count("one model only") == 1
        and "ftbook-merges/one" in done.stdout
    ), done.output
