"The battery against the tasks of lm-evaluation-harness."

import json, sys

import pytest

from ftbook.forgetting import battery as forgetting_battery
from ftbook.forgetting import choices as forgetting_choices
from ftbook.forgetting import harness as forgetting_harness
from ftbook.forgetting import report as forgetting_report
from ftbook.models.load import load_model
from cases.forgetting import loaded, tiny


# The evaluation harness

HARNESS_YAML = """task: facts
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: METRIC, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def harness(tmp_path, monkeypatch):
    "A manager of the harness that knows one task, our facts about orders."
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def make(metric="acc"):
        rows = [r for r in forgetting_choices.shipped_battery()["facts"] if r["task"] == "order"]
        answers = sorted({r["completion"] for r in rows})
        (tmp_path / "facts.jsonl").write_text(
            "\n".join(
                json.dumps(dict(prompt=r["prompt"], choices=answers, gold=answers.index(r["completion"]))) for r in rows
            )
        )
        (tmp_path / "facts.yaml").write_text(
            HARNESS_YAML.replace("FILE", str(tmp_path / "facts.jsonl")).replace("METRIC", metric)
        )
        return tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)

    return make


def test_the_harness_finds_the_same_answers_right(harness):
    model, tokenizer = load_model("smollm2-135m", dtype="float32", device="cpu")
    ours = forgetting_choices.make_task(
        "facts", [r for r in forgetting_choices.shipped_battery()["facts"] if r["task"] == "order"], tokenizer
    )
    theirs = forgetting_harness.ask_harness(model, tokenizer, forgetting_harness.harness_tasks(["facts"], harness()))
    assert (
        theirs == {"facts": forgetting_choices.ask(model, ours)} and any(theirs["facts"]) and not all(theirs["facts"])
    )


def test_a_battery_asks_what_the_harness_asks(harness, loaded):
    model, tokenizer = loaded
    battery = forgetting_battery.make_battery(
        tokenizer, [], forgetting_harness.harness_tasks(["facts"], harness()), 0, rows=5
    )
    then = forgetting_battery.measure_battery(model, battery)
    assert battery.tasks == [] and len(then["tasks"]["facts"]) == 5
    report = forgetting_report.compare_batteries(
        then, forgetting_battery.measure_battery(model, battery, then), tokenizer
    )
    assert report.tasks["facts"][0] == report.tasks["facts"][1] and report.accuracy == (0, 0, 0)


def test_harness_tasks_that_cannot_be_asked(harness, tmp_path):
    with pytest.raises(ValueError, match="no task 'fatcs'"):
        forgetting_harness.harness_tasks(["fatcs"], harness())
    with pytest.raises(ValueError, match="facts has no answers that are right or wrong, but brier_score"):
        forgetting_harness.harness_tasks(["facts"], harness("brier_score"))
    manager = harness()
    (tmp_path / "facts.jsonl").unlink()
    with pytest.raises(ValueError, match="rows of the harness's task facts cannot be had"):
        forgetting_harness.harness_tasks(["facts"], manager)


def test_without_the_harness_its_tasks_are_refused(monkeypatch, loaded):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ImportError, match="pip install lm_eval"):
        forgetting_battery.make_battery(loaded[1], [], ["lm_eval:arc_easy"])
