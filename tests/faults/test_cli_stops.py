"The commands: a run that is stopped goes on to the same end."

import json, re, resource, shutil, signal, subprocess, time
from pathlib import Path

import pytest

from tiny import good_rows, tiny_config, write_config, write_rows
from cases.cli import command, desk, ftbook, same_result, tiny


# Runs, in processes of their own


def start(*args, **more):
    "Start a command as a terminal would."
    return subprocess.Popen(
        [*command, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )


def finish(process):
    "Wait for its end: (exit code, stdout, stderr)."
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in out + err, err
    return process.returncode, out, err


def wait_for(path, process):
    "Wait until a running command has made a file."
    end = time.time() + 60
    while not list(Path().glob(path)):
        assert process.poll() is None and time.time() < end, process.stderr.read()
        time.sleep(0.005)


@pytest.fixture(scope="module")
def long(tiny, tmp_path_factory):
    "A longer run that nothing disturbed: its folder, and what it wrote on stdout and stderr."
    desk = tmp_path_factory.mktemp("long")
    write_rows(desk / "rows.jsonl", good_rows())
    write_config(
        desk / "it.yaml",
        tiny_config(
            tiny,
            "rows.jsonl",
            train=dict(epochs=30, save_every=20),
            method=dict(dropout=0.1),
            forgetting=dict(prompts=0),
        ),
    )
    code, out, err = finish(start("train", "it.yaml", "--json", cwd=desk))
    assert code == 0, err
    return desk, out, err


def test_json_is_alone_on_stdout(long):
    desk, out, err = long
    assert json.loads(out) == json.loads((desk / "ftbook-runs/it/report.json").read_text())
    assert "judge the model as it is" in err and "train" in err


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_goes_on_to_the_same_end(long, tmp_path, monkeypatch, how):
    shutil.copytree(long[0], tmp_path / "desk", ignore=shutil.ignore_patterns("ftbook-runs"))
    monkeypatch.chdir(tmp_path / "desk")
    process = start("train", "it.yaml", "--json")
    wait_for("ftbook-runs/it/checkpoints/step-*", process)
    process.send_signal(how)
    code, out, err = finish(process)
    if how == signal.SIGINT:
        told = json.loads(out)
        assert code == 130 and 20 <= told["step"] < 300 and f"interrupted after step {told['step']}" in err
        assert "Go on with: ftbook train ftbook-runs/it --resume" in err and told["error"] in err
    else:
        assert code == -signal.SIGKILL and out == ""
    assert not Path("ftbook-runs/it/report.json").exists()
    done = ftbook("train", "ftbook-runs/it", "--resume", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["resumed_from"] >= 20, done.stderr
    assert same_result(long[0] / "ftbook-runs/it", Path("ftbook-runs/it"))


def test_ctrl_c_before_the_first_step(long, tmp_path, monkeypatch):
    shutil.copytree(long[0], tmp_path / "desk", ignore=shutil.ignore_patterns("ftbook-runs"))
    monkeypatch.chdir(tmp_path / "desk")
    process = start("train", "it.yaml")
    wait_for("ftbook-runs/it/recipe.yaml", process)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code == 130 and out == "" and "interrupted" in err and "--resume" in err
    assert ftbook("train", "it.yaml", "--resume").exit_code == 0
    assert same_result(long[0] / "ftbook-runs/it", Path("ftbook-runs/it"))


def test_a_disk_that_fills_up_while_it_trains(long, tmp_path, monkeypatch):
    shutil.copytree(long[0], tmp_path / "desk", ignore=shutil.ignore_patterns("ftbook-runs"))
    monkeypatch.chdir(tmp_path / "desk")
    size = (long[0] / "ftbook-runs/it/adapter/adapter_model.safetensors").stat().st_size
    # no checkpoint fits, for it holds the optimizer too
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    code, out, err = finish(start("train", "it.yaml", "--json", preexec_fn=limit))
    assert code == 1 and re.search(
        r"could not be written|cannot be written: File too large", json.loads(out)["error"]
    ), err
    assert Path("ftbook-runs/it/before.json").exists() and not list(Path("ftbook-runs/it/checkpoints").glob("step-*"))
    assert ftbook("train", "it.yaml", "--resume").exit_code == 0
    assert same_result(long[0] / "ftbook-runs/it", Path("ftbook-runs/it"))
