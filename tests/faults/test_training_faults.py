"Training: killed runs, full disks, Ctrl-C, and settings that are refused."

import errno, math, multiprocessing, os, random, signal, time
from pathlib import Path

import pytest
import torch

from ftbook.training import checkpoints as training_checkpoints
from ftbook.training import objective as training_objective
from ftbook.training import watch as training_watch
from ftbook.methods.lora_method import LoRA
from ftbook.training.checks import NonFiniteLoss
from ftbook.training.checkpoints import checkpoints, write_checkpoint
from ftbook.training.evaluate import evaluate
from ftbook.training.settings import Settings
from ftbook.training.tune import finetune
from cases.train import rows, rows_few, tiny, trained

KILLS = int(os.environ.get("FTBOOK_KILLS", 4))  # how often the run of test_killed_and_resumed is killed


def student():
    return LoRA(rank=4, alpha=8, dropout=0.1).apply(tiny())


# --- a run that dies ---------------------------------------------------------------------------------------------

PLAN = dict(lr=1e-3, batch_size=4, epochs=8, progress=False)


def work(out, end, die=None):
    "A process that trains, or goes on with, the run in `out`; at its end the weights go to `end`."
    torch.set_num_threads(1)
    if die:  # in the middle of writing that checkpoint
        rename = os.rename

        def dying(a, b):
            if str(b).endswith(die):
                os.kill(os.getpid(), signal.SIGKILL)
            rename(a, b)

        os.rename = dying
    model = student()
    finetune(model, rows(), out=out, save_every=1, resume=bool(checkpoints(Path(out) / "checkpoints")), **PLAN)
    torch.save(trained(model), end + ".part")
    os.replace(end + ".part", end)


def start(*args):
    child = multiprocessing.get_context("fork").Process(target=work, args=args)
    child.start()
    return child


@pytest.fixture(scope="module")
def never_stopped():
    torch.set_num_threads(1)
    model, began = student(), time.perf_counter()
    finetune(model, rows(), **PLAN)
    return trained(model), time.perf_counter() - began


def test_killed_and_resumed(tmp_path, never_stopped):
    want, seconds = never_stopped
    rng, kills, out, end = random.Random(time.time_ns()), 0, tmp_path / "run", tmp_path / "end.pt"
    while not end.exists():
        child = start(str(out), str(end))
        child.join(rng.uniform(0, 1.2 * seconds) if kills < KILLS else None)
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.join()
        if child.exitcode not in (0, -signal.SIGKILL):
            pytest.fail(f"the run ended with {child.exitcode}")
        if child.exitcode == 0 and kills < KILLS:  # it was through before it was killed: once more from the start
            assert torch.equal(torch.load(end, weights_only=True), want)
            end.unlink()
            out = tmp_path / f"run-{kills}-{rng.random()}"
    assert kills == KILLS and torch.equal(torch.load(end, weights_only=True), want)


def test_killed_while_a_checkpoint_is_written(tmp_path, never_stopped):
    out, end = tmp_path / "run", tmp_path / "end.pt"
    child = start(str(out), str(end), "step-00000007")
    child.join()
    assert child.exitcode == -signal.SIGKILL
    left = sorted(o.name for o in (out / "checkpoints").iterdir())
    assert len(left) == 3 and left[0].startswith(".writing-7-") and left[1:] == ["step-00000005", "step-00000006"]
    child = start(str(out), str(end))
    child.join()
    assert child.exitcode == 0 and torch.equal(torch.load(end, weights_only=True), never_stopped[0])
    assert sorted(o.name for o in (out / "checkpoints").iterdir()) == ["step-00000023", "step-00000024"]


@pytest.mark.parametrize(
    "code, words", [(errno.ENOSPC, "No space left on device"), (errno.EROFS, "Read-only file system")]
)
def test_a_disk_that_cannot_be_written(tmp_path, monkeypatch, code, words):
    model = student()
    finetune(model, rows(), out=tmp_path, **PLAN | dict(max_steps=1))
    last = checkpoints(tmp_path / "checkpoints")[0]
    before = {f.name: f.read_bytes() for f in last.iterdir()}

    def full(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(training_checkpoints, "save_file", full)
    with pytest.raises(OSError, match=f"step 2 could not be written to .*{words}.*nothing is half-written"):
        write_checkpoint(tmp_path / "checkpoints", 2, {}, {})
    assert [o.name for o in (tmp_path / "checkpoints").iterdir()] == [last.name]
    assert {f.name: f.read_bytes() for f in last.iterdir()} == before


def test_the_best_weights_survive_a_stop(tmp_path):
    held_out, plan = rows(6, seed=9), PLAN | dict(lr=0.05, epochs=20, eval_every=1, patience=3)
    whole = student()
    reference = finetune(whole, rows(), eval_examples=held_out, **plan)
    assert reference.stopped == "early"

    def stop(state):
        state.stop = state.step == len(reference.history) - 1

    first = finetune(student(), rows(), eval_examples=held_out, out=tmp_path, callbacks=[stop], **plan)
    assert first.stopped == "callback"
    second = student()
    run = finetune(second, rows(), eval_examples=held_out, out=tmp_path, resume=True, **plan)
    assert run.stopped == "early" and run.resumed_from == len(first.history)
    assert [h["loss"] for h in run.history] == [h["loss"] for h in reference.history]
    assert torch.equal(trained(second), trained(whole))


def test_a_folder_that_cannot_be_one(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot hold the run"):
        finetune(student(), rows(), out=tmp_path / "file", **PLAN)
    with pytest.raises(ValueError, match="needs `out`"):
        finetune(student(), rows(), resume=True, **PLAN)
    with pytest.raises(ValueError, match="needs `eval_examples`"):
        finetune(student(), rows(), patience=2, **PLAN)


# Models in which tokens meet elsewhere than in attention


def test_a_model_that_does_not_run_is_refused_by_name():
    model = tiny(vocab_size=100)

    def fail(module, args, out):
        raise RuntimeError("no such kernel")

    model.model.norm.register_forward_hook(fail)
    for act in (lambda: evaluate(model, rows_few), lambda: finetune(model, rows_few, progress=False)):
        with pytest.raises(ValueError, match="LlamaForCausalLM does not run even a single row"):
            act()


# --- what is borrowed is given back ------------------------------------------------------------------------------


def test_everything_is_given_back_after_an_error():
    model = tiny()

    def fail(state):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        finetune(model, rows(), callbacks=[fail], progress=False)
    assert model.config._attn_implementation == "sdpa" and not any("forward" in m.__dict__ for m in model.modules())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_finishes_the_step_and_saves(tmp_path, capsys):
    def press(state):
        if state.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    model, plan = student(), dict(lr=1e-3, batch_size=4, epochs=4, progress=False)
    run = finetune(model, rows(), out=tmp_path, callbacks=[press], **plan)
    assert (run.stopped, len(run.history)) == (
        "interrupted",
        5,
    ) and "interrupted after step 5 of 12; saved" in capsys.readouterr().out
    resumed, whole = student(), student()
    finetune(resumed, rows(), out=tmp_path, resume=True, **plan)
    finetune(whole, rows(), **plan)
    assert torch.equal(trained(resumed), trained(whole))


def test_a_second_ctrl_c_is_not_caught():
    with pytest.raises(KeyboardInterrupt):
        with training_watch.until_interrupted() as caught:
            os.kill(os.getpid(), signal.SIGINT)
            while not caught:
                pass
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert caught == [signal.SIGINT]


# --- settings, history, trackers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(lr=0.0), "lr must be a number or None, above 0"),
        (dict(lr=math.nan), "lr must be a number or None, above 0"),
        (dict(epochs=-1), "epochs must be a number, above 0"),
        (dict(batch_size=0), "batch_size must be a whole number, 1 or more"),
        (dict(max_steps=0), "max_steps must be a whole number or None, 1 or more"),
        (dict(max_grad_norm=0.0), "max_grad_norm must be a number or None, above 0"),
        (dict(warmup=-0.1), "warmup must be a number, 0 or more"),
        (dict(schedule="steps"), "schedule must be"),
        (dict(precision="int8"), "precision must be"),
        (dict(precision="float16", mixed=True), "float16 needs a GPU"),
        (dict(precision="float32", mixed=True), "leave mixed out"),
        (dict(precision="bfloat16"), "the weights are in float32: give mixed=True"),
        (dict(batch_sise=4), "did you mean batch_size"),
    ],
    ids=str,
)
def test_wrong_settings(wrong, words):
    with pytest.raises(ValueError, match=words):
        finetune(tiny(), rows(), progress=False, **wrong)


def test_weights_in_bfloat16_are_refused():
    with pytest.raises(ValueError, match="is to be trained but is kept in bfloat16"):
        finetune(tiny().bfloat16(), rows(), progress=False)
    with pytest.raises(ValueError, match="nothing would be trained"):
        finetune(tiny().requires_grad_(False), rows(), progress=False)


def test_mixed_precision_learns():
    model = tiny()
    run = finetune(model, rows(), lr=5e-3, batch_size=4, epochs=6, precision="bfloat16", mixed=True, progress=False)
    assert run.history[-1]["loss"] < run.history[0]["loss"] and all(
        p.dtype == torch.float32 for p in model.parameters()
    )
    finetune(model, rows(), max_steps=1, progress=False)  # another precision in the same process


def test_settings_by_name_are_laid_over_those_of_an_object():
    one, other = tiny(), tiny()
    finetune(one, rows(), lr=5e-3, batch_size=4, max_steps=2, progress=False)
    finetune(other, rows(), settings=Settings(lr=5e-3, batch_size=4, max_steps=9), max_steps=2, progress=False)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters()))


def test_what_changes_nothing_in_a_step_may_differ_when_a_run_goes_on(tmp_path):
    finetune(tiny(), rows(), out=tmp_path, save_every=1, **PLAN | dict(max_steps=2))
    with pytest.raises(ValueError, match="lr was"):
        finetune(tiny(), rows(), out=tmp_path, resume=True, **PLAN | dict(max_steps=2, lr=1.0))
    again = finetune(tiny(), rows(), out=tmp_path, resume=True, save_every=2, fast=False, **PLAN | dict(max_steps=2))
    assert again.resumed_from == 2


def test_the_rows_of_a_bad_batch_are_named():
    model = tiny()
    bad = rows()
    token = bad[7].input_ids[0]
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = math.nan
    has = {e.index for e in bad if token in e.input_ids}
    with pytest.raises(NonFiniteLoss, match="the loss is nan") as error:
        finetune(model, bad, batch_size=1, epochs=1, max_grad_norm=None, progress=False)
    named = int(str(error.value).split("held rows ")[1].split(".")[0])
    assert named in has


def test_a_model_without_a_head_of_its_own(monkeypatch):
    model = tiny()
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    assert not training_objective.has_linear_head(model)
