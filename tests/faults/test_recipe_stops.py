"The recipe: a run can be stopped anywhere and gone on with."

import errno, json, os, re, signal, sys
from pathlib import Path

import pytest

from ftbook.forgetting import choices as forgetting_choices
from ftbook.recipe import checks as recipe_checks, words as recipe_words
from ftbook.recipe import facts as recipe_facts
from ftbook.recipe import judge as recipe_judge
from ftbook.recipe import report as recipe_report
from ftbook.recipe import run as recipe_run
from ftbook.recipe import stages as recipe_stages
from ftbook.training import tune as training_tune
from ftbook.methods.files import load_adapter
from ftbook.models.load import load_model
from ftbook.training.tune import finetune
from tiny import save_tiny_model
from cases.recipe import make, same_files, tiny


# The run


def test_a_run_begun_without_a_battery_goes_on(make, tmp_path):
    recipe_run.run(make(), tmp_path / "run", progress=False)
    before = json.loads((tmp_path / "run/before.json").read_text())
    for name in ("report.json", "report.html"):
        (tmp_path / "run" / name).unlink()
    (tmp_path / "run/before.json").write_text(json.dumps({k: v for k, v in before.items() if k != "battery"}))
    assert recipe_run.run(make(), tmp_path / "run", resume=True, progress=False).facts["kept"] is None


def test_a_folder_belongs_to_one_run(make, tmp_path):
    recipe_run.run(make(), tmp_path / "run", progress=False)
    with pytest.raises(recipe_checks.CheckFailed, match="holds another run"):
        recipe_run.run(make(), tmp_path / "run", progress=False)
    with pytest.raises(recipe_checks.CheckFailed, match="method.rank was 4 and is 2"):
        recipe_run.run(make(method=dict(rank=2)), tmp_path / "run", resume=True, progress=False)
    before = (tmp_path / "run/report.json").read_bytes()
    assert recipe_run.run(make(), tmp_path / "run", resume=True, progress=False).facts == json.loads(before)
    assert (tmp_path / "run/report.json").read_bytes() == before


class StopAt:
    "Send Ctrl-C, or raise, after a step."

    def __init__(self, step, how):
        self.step, self.how = step, how

    def __call__(self, state):
        if state.step == self.step:
            self.how()


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def crash():
    raise RuntimeError("the power went out")


@pytest.mark.parametrize("how, step", [(ctrl_c, 1), (ctrl_c, 5), (ctrl_c, 10), (crash, 3), (crash, 7)])
def test_a_stopped_run_goes_on_to_the_same_weights(make, tmp_path, monkeypatch, how, step):
    whole = recipe_run.run(make(), tmp_path / "whole", progress=False)
    with monkeypatch.context() as m:
        m.setattr(
            recipe_stages,
            "finetune",
            lambda *a, callbacks, **k: finetune(*a, **k, callbacks=[*callbacks, StopAt(step, how)]),
        )
        if how is ctrl_c:
            assert (stopped := recipe_run.run(make(), tmp_path / "run", progress=False)).stopped in (
                "interrupted",
                "finished",
            ) and stopped.facts
        else:
            pytest.raises(RuntimeError, recipe_run.run, make(), tmp_path / "run", progress=False)
    result = recipe_run.run(make(), tmp_path / "run", resume=True, progress=False)
    assert result.stopped == "finished" and (tmp_path / "run/report.json").exists()
    assert result.facts["accuracy_after"] == whole.facts["accuracy_after"]
    read = lambda o: (tmp_path / o / "adapter/adapter_model.safetensors").read_bytes()
    assert read("run") == read("whole")


def test_what_was_measured_before_is_kept(make, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(recipe_run, "apply_method", lambda *a: crash())
        pytest.raises(RuntimeError, recipe_run.run, make(), tmp_path / "run", progress=False)
    before = (tmp_path / "run/before.json").read_bytes()
    recipe_run.run(make(), tmp_path / "run", resume=True, progress=False)
    assert (tmp_path / "run/before.json").read_bytes() == before


@pytest.mark.parametrize("where", ["before.json", "report.html"])
def test_a_disk_that_fills_up(make, tmp_path, monkeypatch, where):
    write = Path.write_text

    def full(self, *args, **kwargs):
        if where in self.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return write(self, *args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="cannot be written: No space left on device.*kept there.*resume"):
            recipe_run.run(make(), tmp_path / "run", progress=False)
    assert not list((tmp_path / "run").glob(".*.part"))
    assert recipe_run.run(make(), tmp_path / "run", resume=True, progress=False).stopped == "finished"


def test_a_run_with_another_optimizer_can_be_stopped_and_gone_on_with(make, tmp_path):
    recipe = make(train=dict(optimizer="adamw8bit"), evaluate=dict(samples=0), forgetting=dict(measure=False))
    whole = recipe_run.run(recipe, tmp_path / "whole", progress=False)
    real, steps = training_tune.finetune, []

    def until_four(model, examples, **kw):
        return real(
            model,
            examples,
            **kw
            | dict(
                callbacks=[
                    lambda state: (
                        steps.append(state.step) or os.kill(os.getpid(), signal.SIGINT) if state.step == 4 else None
                    )
                ]
            ),
        )

    with pytest.MonkeyPatch.context() as m:
        m.setattr(recipe_stages, "finetune", until_four)
        assert recipe_run.run(recipe, tmp_path / "run", progress=False).stopped == "interrupted" and steps == [4]
    assert recipe_run.run(recipe, tmp_path / "run", resume=True, progress=False).facts["loss_after"] == pytest.approx(
        whole.facts["loss_after"], rel=1e-5
    )


# From a bare file


def test_a_folder_goes_on_with_its_run(make, tmp_path, monkeypatch):
    whole = recipe_run.run(make(), tmp_path / "whole", progress=False)
    with monkeypatch.context() as m:
        m.setattr(recipe_run, "note_training", lambda *a: crash())
        pytest.raises(RuntimeError, recipe_run.run, make(), tmp_path / "run", progress=False)
    assert recipe_run.run(tmp_path / "run", progress=False).stopped == "finished"
    assert same_files(tmp_path / "run", whole.folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="there is no configuration .*empty/recipe.yaml"):
        recipe_run.run(tmp_path / "empty", progress=False)


# Writes that are interrupted


class Killed(BaseException):
    "Ends a process at once, as nothing else does."


class Watch:
    "Sees what happens to the files below a folder, and ends the process before one of its renames."

    def __init__(self, folder, last=None):
        self.folder, self.last, self.renames, self.opened = str(folder) + os.sep, last, 0, []

    def __call__(self, event, args):
        if event == "os.rename" and str(args[1]).startswith(self.folder):
            self.renames += 1
            if self.renames == self.last:
                raise Killed
        if event == "open" and str(args[0]).startswith(self.folder) and args[2] & (os.O_WRONLY | os.O_RDWR):
            self.opened.append(str(args[0])[len(self.folder) :])


@pytest.fixture(scope="module")
def watching():
    "A list; the last `Watch` in it is told of every file that is opened or renamed."
    found = []
    sys.addaudithook(lambda event, args: found and event in ("open", "os.rename") and found[-1](event, args))
    yield found
    found.clear()


def seen(watching, watch, *args, **kwargs):
    "Run while somebody watches."
    watching.append(watch)
    try:
        return recipe_run.run(*args, progress=False, **kwargs)
    finally:
        watching.pop()


def whole_files(folder):
    "Every file that is not hidden, as bytes; all of them must be whole."
    from safetensors.torch import load_file

    found = {}
    for f in folder.rglob("*") if folder.exists() else ():
        if f.is_file() and not any(part.startswith(".") for part in f.relative_to(folder).parts):
            found[f.relative_to(folder).as_posix()] = f.read_bytes()
            json.loads(f.read_text()) if f.suffix == ".json" else None
            load_file(f) if f.suffix == ".safetensors" else None
    return found


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_that_ends_at_any_write_leaves_the_old_state_and_goes_on(make, tmp_path, watching, method):
    recipe = make(
        method=dict(type=method),
        model=dict(dtype=None if method == "full" else "float32"),
        train=dict(max_steps=2, save_every=1),
        evaluate=dict(rows=4, samples=0),
        forgetting=dict(measure=False),
    )
    watch = Watch(tmp_path / "whole")
    seen(watching, watch, recipe, tmp_path / "whole")
    assert watch.opened and all(any(p.startswith(".") for p in Path(o).parts) for o in watch.opened), (
        "no file that can be seen is written in its place"
    )
    result = "adapter/adapter_model.safetensors" if method == "lora" else "model/model.safetensors"
    wanted, before = whole_files(tmp_path / "whole"), {}
    for n in range(1, watch.renames + 1):
        folder = tmp_path / f"run{n}"
        with pytest.raises(Killed):
            seen(watching, Watch(folder, n), recipe, folder)
        left = whole_files(folder)
        assert all(left[name] for name in left)
        before = left
        recipe_run.run(recipe, folder, resume=True, progress=False)
        ended = whole_files(folder)
        assert ended.keys() == wanted.keys() and ended[result] == wanted[result], f"rename {n}"
    assert before.keys() == wanted.keys() - {"report.json"} | {
        k for k in before if k.startswith(("checkpoints", "trained"))
    }


# A judge that fails


def trained(value):
    return hasattr(value, "ftbook_method")


def broken(real, when=lambda *args: True):
    "A function that raises where `when` holds of its arguments."

    def call(*args, **kwargs):
        if when(*args):
            raise RuntimeError("the judge is ill")
        return real(*args, **kwargs)

    return call


def measured(facts):
    "What was found out by a run, without the time that it took and the memory that was free."
    found = {
        k: v
        for k, v in facts.items()
        if k.startswith(("accuracy", "loss", "n_", "forgetting", "kept", "samples", "missing", "steps", "stopped"))
    }
    return found | dict(checked=[(f["level"], f["where"]) for f in facts["findings"]])


@pytest.mark.parametrize(
    "module, name, when, part",
    [
        (recipe_judge, "choice_scores", trained, "rows"),
        (recipe_judge, "write_answers", trained, "answers"),
        (recipe_judge, "measure_battery", trained, "battery"),
        (recipe_judge, "_texts_read", trained, "texts"),
        (recipe_facts, "compare_losses", None, "texts"),
        (recipe_facts, "moved", None, "changes"),
        (recipe_run, "show_mask", None, "mask"),
        (recipe_report, "draw_losses", None, "Training"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_judge_that_fails_costs_its_part_and_not_the_run(
    make, tiny, tmp_path, monkeypatch, capsys, module, name, when, part
):
    whole = recipe_run.run(make(), tmp_path / "whole", progress=False)
    with monkeypatch.context() as m:
        m.setattr(module, name, broken(getattr(module, name), *([lambda model, *rest: when(model)] if when else [])))
        result = recipe_run.run(make(), tmp_path / "run")
    assert result.stopped == "finished" and [o["part"] for o in result.facts["missing"]] == [part]
    assert re.match(r"RuntimeError: the judge is ill \(test_recipe_stops.py, line \d+\)$", result.facts["missing"][0]["why"])
    assert "the report lacks" in repr(result) and (
        part == "Training" or "warning: the report will lack" in capsys.readouterr().err
    )
    assert json.loads((tmp_path / "run/report.json").read_text()) == result.facts
    html = (tmp_path / "run/report.html").read_text()
    assert "the judge is ill" in html and "ftbook train FOLDER --resume" in html
    load_adapter(load_model(tiny, dtype="float32", device="cpu")[0], tmp_path / "run/adapter")
    same = {k: v for k, v in measured(whole.facts).items() if k != "missing"}
    assert part not in ("mask", "Training") or same == {k: measured(result.facts)[k] for k in same}
    monkeypatch.setattr(recipe_stages, "finetune", lambda *args, **kwargs: pytest.fail("it was trained again"))
    again = recipe_run.run(make(), tmp_path / "run", resume=True, progress=False)
    assert measured(again.facts) == measured(whole.facts) and same_files(tmp_path / "run", tmp_path / "whole")
    assert (
        set(again.facts["seconds_by_stage"]) == set(whole.facts["seconds_by_stage"])
        and "the judge is ill" not in (tmp_path / "run/report.html").read_text()
    )


def test_a_judge_that_fails_for_good_fails_again_and_the_run_stays(make, tmp_path, monkeypatch):
    monkeypatch.setattr(
        recipe_judge, "choice_scores", broken(forgetting_choices.choice_scores, lambda model, *rest: trained(model))
    )
    first = recipe_run.run(make(), tmp_path / "run", progress=False)
    again = recipe_run.run(make(), tmp_path / "run", resume=True, progress=False)
    assert (
        measured(first.facts) == measured(again.facts)
        and again.facts["accuracy_after"] is None
        and again.facts["loss_after"] is None
    )
    assert "was not measured" in again.report.html() and "trained in 10 steps and saved" in recipe_words.summary_line(
        again.facts
    )


def test_a_prompt_that_refuses_a_judges_rows_is_kept(make, tmp_path, capsys):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sliding = Gemma3TextConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        pad_token_id=2,
        eos_token_id=2,
        bos_token_id=1,
    )
    folder = save_tiny_model(tmp_path / "gemma")
    Gemma3ForCausalLM(sliding).save_pretrained(folder)
    facts = recipe_run.run(
        make(model=dict(name=str(folder)), method=dict(type="prompt", num_virtual_tokens=4)), tmp_path / "run"
    ).facts
    [lack] = facts["missing"]
    assert (
        lack["part"] == "battery"
        and "left padding in a sliding window" in lack["why"]
        and facts["forgetting"]
        and facts["loss_after"] is not None
    )
    assert "left padding in a sliding window" in capsys.readouterr().err
    load_adapter(load_model(folder, dtype="float32", device="cpu")[0], tmp_path / "run/adapter")


def test_every_judge_may_fail_at_once(make, tmp_path, monkeypatch):
    for name in ("choice_scores", "write_answers", "measure_battery", "_texts_read"):
        monkeypatch.setattr(
            recipe_judge, name, broken(getattr(recipe_judge, name), lambda model, *rest: trained(model))
        )
    facts = recipe_run.run(make(), tmp_path / "run", progress=False).facts
    assert {o["part"] for o in facts["missing"]} == {"rows", "answers", "battery", "texts"} and (
        tmp_path / "run/adapter"
    ).is_dir()


@pytest.mark.parametrize("name", ["choice_scores", "write_answers", "measure_battery", "_texts_read"])
def test_a_judge_that_fails_before_the_training_ends_the_run(make, tmp_path, monkeypatch, name):
    monkeypatch.setattr(recipe_judge, name, broken(getattr(recipe_judge, name)))
    with pytest.raises(RuntimeError, match="the judge is ill"):
        recipe_run.run(make(), tmp_path / "run", progress=False)
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == ["recipe.yaml"]


def test_a_whole_model_is_judged_again_as_it_was_saved(make, tmp_path, monkeypatch):
    recipe = make(
        method=dict(type="full"),
        model=dict(dtype=None),
        train=dict(patience=1, eval_every=2, epochs=4),
        forgetting=dict(tasks=[], prompts=0),
    )
    with monkeypatch.context() as m:
        m.setattr(
            recipe_run,
            "measure_together",
            broken(recipe_judge.measure_together, lambda job, p, model, before=None, *rest: before),
        )
        # what no part of the judgement foresees
        pytest.raises(RuntimeError, recipe_run.run, recipe, tmp_path / "run", progress=False)
    before = (tmp_path / "run/model/model.safetensors").read_bytes()
    assert not (tmp_path / "run/report.json").exists()
    monkeypatch.setattr(recipe_stages, "finetune", lambda *args, **kwargs: pytest.fail("it was trained again"))
    result = recipe_run.run(recipe, tmp_path / "run", resume=True, progress=False)
    assert (
        result.facts["missing"] == []
        and len(result.facts["kept"]["moved"]) == 15
        and result.facts["trained_parameters"] == result.facts["total_parameters"]
    )
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == before
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == [
        "before.json",
        "model",
        "recipe.yaml",
        "report.html",
        "report.json",
    ]
