"More than one device: configurations that contradict themselves, and processes that fail."

import pytest, torch, yaml

from ftbook.training import launch as training_launch
from ftbook.scale import all_reduce_bytes, bubble, sharded_bytes, split_mlp, traffic
from ftbook.training.launch import check_config, config_files, launch_config, run_processes


# --- arithmetic --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda: sharded_bytes({}, 0),
        lambda: sharded_bytes({}, 2, "fsdp1"),
        lambda: traffic({}, 2, "none"),
        lambda: all_reduce_bytes(1, -1),
        lambda: bubble(1, 0),
        lambda: split_mlp(torch.ones(1, 2), torch.ones(3, 2), torch.ones(2, 3), 2),
    ],
)
def test_impossible_numbers_are_refused(call):
    with pytest.raises(ValueError, match="must be|has 1 or more|do not divide"):
        call()


# --- configurations ----------------------------------------------------------------------------------------------


def changed(kind, **changes):
    c = yaml.safe_load(config_files()[kind].read_text())
    for k, v in changes.items():
        inner = c.get("fsdp_config") or c.get("deepspeed_config") or {}
        (inner if k in inner or k.startswith("fsdp_") and k != "fsdp_config" else c)[k] = v
    return c


@pytest.mark.parametrize(
    "config, says",
    [
        (changed("ddp", num_proceses=2), "did you mean num_processes"),
        (changed("fsdp2", fsdp_ofload_params=True), "did you mean fsdp_offload_params"),
        (changed("ddp", distributed_type="TPU"), "must be MULTI_GPU, FSDP or DEEPSPEED"),
        (changed("ddp", distributed_type="MULTI_CPU"), "MULTI_CPU starts one process"),
        (changed("ddp", num_processes=0), "a whole number from 1"),
        (changed("ddp", num_processes="two"), "a whole number from 1"),
        (changed("ddp", num_processes=True), "a whole number from 1"),
        (changed("ddp", mixed_precision="fp8"), "mixed_precision must be"),
        (changed("ddp", mixed_precision="fp16", use_cpu=True), "fp16 needs a GPU"),
        (changed("ddp", fsdp_config=dict(fsdp_version=2)), "belong together"),
        (changed("fsdp2", fsdp_config={}), "belong together"),
        (changed("fsdp2", fsdp_version=1), "fsdp_version must be 2"),
        (changed("zero2", zero_stage=4), "zero_stage must be"),
        (changed("zero2", offload_param_device="cpu"), "needs zero_stage 3"),
        (changed("zero2", gradient_accumulation_steps=4), "must be 1"),
        (changed("zero2", use_cpu=True), "no DeepSpeed with use_cpu"),
    ],
)
def test_what_contradicts_itself_is_refused(config, says):
    with pytest.raises(ValueError, match=says):
        check_config(config)


def test_all_faults_are_told_at_once(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(changed("fsdp2", fsdp_version=1, num_processes=0)))
    with pytest.raises(ValueError, match="c.yaml.*num_processes.*fsdp_version"):
        check_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("text, says", [("a: [", "no YAML"), ("- 1", "keys and values"), (None, "cannot be read")])
def test_a_file_that_is_no_configuration(text, says, tmp_path):
    if text:
        (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=says):
        check_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("kind", [k for k in config_files() if k.startswith("zero")])
def test_what_accelerate_tells_deepspeed(kind, monkeypatch):
    "DeepSpeed cannot run here; the dictionary that accelerate hands to it can be looked at."
    from accelerate.utils import DeepSpeedPlugin

    given = launch_config(kind, 2)["deepspeed_config"]
    plugin = DeepSpeedPlugin(
        zero_stage=given["zero_stage"],
        gradient_accumulation_steps=given.get("gradient_accumulation_steps", 1),
        offload_optimizer_device=given.get("offload_optimizer_device"),
        offload_param_device=given.get("offload_param_device"),
        zero3_save_16bit_model=given.get("zero3_save_16bit_model", False),
    )
    zero = plugin.deepspeed_config["zero_optimization"]
    assert zero["stage"] == int(kind[4]) and plugin.deepspeed_config["gradient_accumulation_steps"] == 1
    away = "cpu" if kind.endswith("offload") else "none"
    assert (zero["offload_optimizer"]["device"] or "none") == away and (zero["offload_param"]["device"] or "none") == (
        away if kind.startswith("zero3") else "none"
    )


def test_what_this_machine_lacks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(training_launch.importlib.util, "find_spec", lambda name: None)
    check_config(launch_config("ddp", 2), here=True)
    check_config(launch_config("ddp", 4, num_machines=2), here=True)
    with pytest.raises(ValueError, match="there are 2: set num_processes to 2"):
        check_config(launch_config("fsdp2", 4), here=True)
    with pytest.raises(ValueError, match="pip install deepspeed"):
        check_config(launch_config("zero3", 2), here=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="there is none here"):
        check_config(launch_config("ddp", 2), here=True)
    check_config(launch_config("fsdp2", 8, cpu=True), here=True)


# --- two processes -----------------------------------------------------------------------------------------------


def one_dies():
    import os, time

    if os.environ["RANK"] == "1":
        raise RuntimeError("out of luck")
    time.sleep(60)


def both_sleep():
    import time

    time.sleep(60)


def test_a_failure_ends_all_and_shows_the_log():
    with pytest.raises(RuntimeError, match="2 processes failed(.|\n)*out of luck"):
        run_processes(one_dies, timeout=50)


def test_time_runs_out():
    with pytest.raises(RuntimeError, match="stopped after 2 seconds"):
        run_processes(both_sleep, timeout=2)
