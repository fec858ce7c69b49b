"The command that chooses."

import json

import pytest
from typer.testing import CliRunner

from ftbook.choose import method as choose_method, recommend as choose_recommend
from ftbook import cli
from ftbook.quality.findings import Finding, Findings
from ftbook.recipe.config import load_recipe
from cases.choose import known, rows


# The command


def ftbook(*args):
    return CliRunner().invoke(cli.app, [str(a) for a in args], prog_name="ftbook")


@pytest.fixture
def desk(rows, known, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(choose_recommend, "load_sweep", lambda path=None: known)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_the_command_writes_a_recipe(desk):
    done = ftbook("recommend", "rows.jsonl", "--memory-gib", 8, "--device", "cpu", "--encoder", "none")
    assert done.exit_code == 0 and "# LoRA" in done.stdout and "ftbook train rows.yaml" in done.stdout, done.output
    assert load_recipe("rows.yaml").method.type == "lora"
    again = ftbook("recommend", "rows.jsonl", "--memory-gib", 8, "--device", "cpu", "--encoder", "none", "--json")
    assert again.exit_code == 1 and "is there already" in json.loads(again.stdout)["error"]
    told = json.loads(
        ftbook(
            "recommend",
            "rows.jsonl",
            "--memory-gib",
            8,
            "--device",
            "cpu",
            "--encoder",
            "none",
            "--json",
            "--out",
            "b.yaml",
        ).stdout
    )
    assert told["choice"] == "LoRA" and told["written"] == "b.yaml"


@pytest.mark.parametrize(
    "args, code, said",
    [
        (["gone.jsonl"], 1, "gone.jsonl"),
        (["rows.jsonl", "--memory-gib", "-2"], 1, "GiB"),
        (["rows.jsonl", "--finetunes", "-2"], 2, "finetunes"),
    ],
)
def test_the_command_refuses(desk, args, code, said):
    done = ftbook("recommend", *args, "--device", "cpu", "--encoder", "none")
    assert done.exit_code == code and said in done.stderr and not (desk / "rows.yaml").exists(), done.output


def test_a_recommendation_escapes_what_it_shows():
    evil = "<script>alert(1)</script>"
    decision = choose_method.Decision(evil, (choose_method.Border(evil, "asked"),))
    findings = Findings([Finding("error", "form", evil)])
    reasons = {"data.source": (f"{evil}.csv", evil, "asked")}
    shown = choose_recommend.Recommendation(decision, None, reasons, findings, {})._repr_html_()
    assert "<script" not in shown and shown.count("&lt;script&gt;") >= 5
