"More than one device: the arithmetic, the configurations, and two processes against one."

import json, os, subprocess, sys
from pathlib import Path

import pytest, torch, yaml
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file

from ftbook.training import launch as training_launch
from ftbook.methods.files import load_adapter
from ftbook.models.scale import training_bytes
from ftbook.recipe.run import run
from ftbook.scale import (
    SHARDING,
    all_reduce_bytes,
    bubble,
    gather,
    pipeline_schedule,
    ring_all_reduce,
    shard,
    sharded_bytes,
    sliced_linear,
    split_mlp,
    traffic,
)
from ftbook.show.schedule import draw_schedule
from ftbook.training.launch import config_files, launch_config, run_processes, check_config
from ftbook.training.checkpoints import checkpoints, read_checkpoint
from tiny import good_rows, save_tiny_model, tiny_config, write_config, write_rows


# --- arithmetic --------------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 40))
def test_ring_sums_for_everybody(n, size):
    parts = [torch.randint(-9, 9, (size,)) for _ in range(n)]
    sums, sent = ring_all_reduce(parts)
    assert all(torch.equal(s, sum(parts)) for s in sums)
    assert sum(sent) == 2 * (n - 1) * size == pytest.approx(n * all_reduce_bytes(size, n))
    assert max(sent) - min(sent) <= 2 * n


@given(st.integers(1, 10**9), st.integers(1, 512), st.sampled_from(list(SHARDING)))
def test_a_share_is_no_more_than_the_whole_and_no_less_than_its_part(n, devices, sharding):
    items = training_bytes(n)
    held = sharded_bytes(items, devices, sharding)
    assert held.keys() == items.keys() and all(items[k] / devices <= held[k] <= items[k] for k in items)
    if sharding in ("zero3", "fsdp2"):
        assert sum(held.values()) <= sum(items.values()) / devices + len(items)


def test_each_stage_holds_less_and_only_the_last_sends_more():
    items = training_bytes(10**9)
    held = [sum(sharded_bytes(items, 8, s).values()) for s in ("ddp", "zero1", "zero2", "zero3")]
    sent = [traffic(items, 8, s) for s in ("ddp", "zero1", "zero2", "zero3")]
    assert held == sorted(held, reverse=True) and len(set(held)) == 4
    assert sent[0] == sent[1] == sent[2] and sent[3] == 1.5 * sent[0]
    assert traffic(items, 8, "fsdp2", pieces=3) == 3 * sent[3] and traffic(items, 1, "fsdp2") == 0


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


def test_one_vocabulary():
    from ftbook.training.processes import DIVIDED

    assert set(DIVIDED) == set(SHARDING)
    items = training_bytes(10**9)
    assert sharded_bytes(items, 4, "fsdp") == sharded_bytes(items, 4, "fsdp2") and traffic(items, 4, "fsdp") == traffic(
        items, 4, "fsdp2"
    )


@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(1, 9))
def test_slices_are_equal_and_come_together(shape, n):
    t = torch.randn(shape)
    slices = shard(t, n)
    assert len(slices) == n and len({len(s) for s in slices}) == 1 and torch.equal(gather(slices, tuple(shape)), t)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_a_sliced_layer_is_the_layer(n):
    torch.manual_seed(n)
    x, w = (
        torch.randn(4, 7, dtype=torch.float64, requires_grad=True),
        torch.randn(5, 7, dtype=torch.float64, requires_grad=True),
    )
    slices = [s.detach().requires_grad_() for s in shard(w, n)]
    got, want = sliced_linear(x, slices, w.shape), x @ w.t()
    g = torch.randn_like(want)
    want_x, want_w = torch.autograd.grad(want, (x, w), g)
    got_x, *got_w = torch.autograd.grad(got, (x, *slices), g)
    assert torch.equal(got, want) and torch.equal(got_x, want_x) and torch.equal(gather(got_w, w.shape), want_w)


@given(st.integers(1, 8), st.integers(1, 12))
def test_a_pipeline_does_all_its_work_in_order(p, m):
    lines = pipeline_schedule(p, m)
    assert all(sorted(filter(None, line)) == sorted([f"{k}{i + 1}" for i in range(m) for k in "FB"]) for line in lines)
    for a, b in zip(lines, lines[1:]):
        assert all(
            a.index(f"F{i + 1}") < b.index(f"F{i + 1}") and a.index(f"B{i + 1}") > b.index(f"B{i + 1}")
            for i in range(m)
        )
    assert sum(line.count("") for line in lines) / len(lines) / len(lines[0]) == pytest.approx(bubble(p, m))
    assert draw_schedule(lines).html.count("<rect") == p * 2 * (m + p - 1)


# --- configurations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", config_files())
def test_a_ready_file_is_valid_and_accelerate_reads_it(kind, tmp_path):
    from accelerate.commands.config.config_args import ClusterConfig

    check_config(config_files()[kind])
    config = launch_config(kind, 8, mixed_precision="bf16", path=tmp_path / "c.yaml")
    assert yaml.safe_load((tmp_path / "c.yaml").read_text()) == config == check_config(tmp_path / "c.yaml")
    assert ClusterConfig.from_yaml_file(str(tmp_path / "c.yaml")).num_processes == 8


def test_a_ready_file_is_in_the_package():
    text = (Path(__file__).parent.parent / "setup.py").read_text()
    assert '"assets/**"' in text and all(p.parts[-3:-1] == ("assets", "accelerate") for p in config_files().values())


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


def test_launch_config_names_the_kinds():
    with pytest.raises(ValueError, match="zero3-offload"):
        launch_config("fsdp1")
    with pytest.raises(ValueError, match="unknown key nproc"):
        launch_config("ddp", 2, nproc=3)
    assert (
        launch_config("zero3-offload", offload_param_device="none")["deepspeed_config"]["offload_param_device"]
        == "none"
    )


# --- two processes -----------------------------------------------------------------------------------------------


def in_one(method, **kwargs):
    """A run of eight steps over fourteen rows of unlike length, the last batch of an epoch uneven: losses, weights, and
    why it stopped."""
    import torch
    from ftbook.data.examples import Example
    from ftbook.methods.lora_method import LoRA
    from ftbook.training.evaluate import evaluate
    from ftbook.training.tune import finetune
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            max_position_embeddings=64,
            initializer_range=0.2,
        )
    )
    rows = [
        Example(torch.randint(1, 97, (n,)).tolist(), [j >= n // 3 for j in range(n)], index=i)
        for i, n in enumerate(torch.randint(5, 30, (14,)).tolist())
    ]
    if method == "qlora":
        from ftbook.methods.quant import quantize_

        quantize_(model)
    if method != "full":
        LoRA(rank=4, dropout=0.0).apply(model)
    run = finetune(
        model,
        rows,
        **(
            dict(lr=1e-2, epochs=2, batch_size=4, max_tokens=40, eval_examples=rows[:5], eval_every=3, progress=False)
            | kwargs
        ),
    )
    return dict(
        losses=[h["loss"] for h in run.history],
        evals=[h["eval_loss"] for h in run.history if h["eval_loss"]],
        stopped=run.stopped,
        resumed=run.resumed_from,
        end=evaluate(model, rows[:5]).loss,
        weights={n: p.detach().clone() for n, p in model.named_parameters()},
        tied=model.lm_head.weight is model.model.embed_tokens.weight,
        kind=type(model.model.layers[0]).__name__,
    )


def in_two(tests, folder, alone, tries):
    """The same run in every way that one launch can try; weights as nested lists would be long, so the first process
    writes them."""
    import os, signal, sys

    sys.path.insert(0, tests)
    import torch
    from test_scale import in_one
    from ftbook.training.checks import NonFiniteLoss

    rank, found = int(os.environ["RANK"]), {}

    def at(step, act):
        return lambda state: act(state) if state.step == step and rank == 1 else None

    def spoil(state):
        next(p for p in state.model.parameters() if p.requires_grad).data.fill_(float("nan"))

    for method in ("full", "lora", "qlora"):
        found[method] = in_one(method)
    found["begun"] = in_one("full", out=f"{folder}/begun", callbacks=[at(3, lambda s: setattr(s, "stop", True))])
    found["went on"] = in_one("full", out=alone, resume=True)
    if "signal" in tries:
        found["signal"] = in_one(
            "full", out=f"{folder}/signal", callbacks=[at(2, lambda s: signal.raise_signal(signal.SIGINT))]
        )
    found["best"] = in_one("full", lr=0.3, epochs=6, eval_every=1, patience=2)
    if "nan" in tries:
        try:
            in_one("full", callbacks=[at(2, spoil)])
        except NonFiniteLoss as e:
            found["nan"] = str(e)
    try:
        in_one("full", batch_size=1)
    except ValueError as e:
        found["idle"] = str(e)
    if rank == 0:
        torch.save({k: v.pop("weights") for k, v in found.items() if isinstance(v, dict)}, f"{folder}/weights.pt")
    return {k: {a: b for a, b in v.items() if a != "weights"} if isinstance(v, dict) else v for k, v in found.items()}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    stopped = in_one("full", out=folder / "begun", callbacks=[lambda s: setattr(s, "stop", s.step == 3)])
    return dict(
        full=in_one("full"),
        lora=in_one("lora"),
        qlora=in_one("qlora"),
        best=in_one("full", lr=0.3, epochs=6, eval_every=1, patience=2),
        folder=folder,
        begun=stopped,
    )


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def two(request, one, tmp_path_factory):
    import shutil

    folder = tmp_path_factory.mktemp(request.param)
    shutil.copytree(one["folder"] / "begun", folder / "alone")
    ranks = run_processes(
        in_two,
        kind=request.param,
        timeout=240,
        tests=str(Path(__file__).parent),
        folder=str(folder),
        alone=str(folder / "alone"),
        tries=["signal", "nan"] if request.param == "ddp" else ["signal"],
    )
    return dict(
        kind=request.param, ranks=ranks, folder=folder, weights=torch.load(folder / "weights.pt", weights_only=True)
    )


def close(a, b):
    return len(a) == len(b) and all(abs(x - y) < 1e-4 for x, y in zip(a, b))


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_two_processes_lose_what_one_loses(one, two, method):
    for found in (r[method] for r in two["ranks"]):
        assert (
            close(found["losses"], one[method]["losses"])
            and close(found["evals"], one[method]["evals"])
            and len(found["losses"]) == 8
        )
    assert two["ranks"][0][method]["evals"] == two["ranks"][1][method]["evals"]


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_the_model_is_given_back_whole(one, two, method):
    mine, theirs = one[method]["weights"], two["weights"][method]
    assert mine.keys() == theirs.keys() and all((mine[n] - theirs[n]).abs().max() < 1e-3 for n in mine)
    assert all(r[method]["tied"] and r[method]["kind"] == "LlamaDecoderLayer" for r in two["ranks"])


def test_a_checkpoint_of_two_is_gone_on_with_by_one(one, two):
    begun = checkpoints(two["folder"] / "begun" / "checkpoints")
    tensors, state = read_checkpoint(begun[-1])
    mine = read_checkpoint(checkpoints(one["folder"] / "begun" / "checkpoints")[-1])[0]
    assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in mine.items()} and state["step"] == 3
    # though only one process asked for it
    assert two["ranks"][0]["begun"]["stopped"] == two["ranks"][1]["begun"]["stopped"] == "callback"
    gone_on = in_one("full", out=two["folder"] / "begun", resume=True)
    assert gone_on["resumed"] == 3 and close(gone_on["losses"], one["full"]["losses"])


def test_a_checkpoint_of_one_is_gone_on_with_by_two(one, two):
    for r in two["ranks"]:
        assert r["went on"]["resumed"] == 3 and close(r["went on"]["losses"], one["full"]["losses"])


def test_ctrl_c_in_one_stops_both_and_saves(two):
    assert [r["signal"]["stopped"] for r in two["ranks"]] == ["interrupted"] * 2
    assert [c.name for c in checkpoints(two["folder"] / "signal" / "checkpoints")] == ["step-00000002"]


def test_the_best_weights_are_the_same_everywhere(one, two):
    first, second = (r["best"] for r in two["ranks"])
    assert (
        first["stopped"] == second["stopped"] == one["best"]["stopped"] == "early" and first["evals"] == second["evals"]
    )
    assert first["end"] == pytest.approx(min(first["evals"]), abs=1e-4) == second["end"]
    assert first["evals"][-1] > min(first["evals"]) + 1e-3  # else it would prove nothing


def test_a_broken_number_in_one_stops_both(two):
    if two["kind"] == "ddp":
        assert all("step 3" in r["nan"] and "as they were after step 2" in r["nan"] for r in two["ranks"])


def test_processes_without_rows_are_refused(two):
    assert all("leaves 1 of 2 processes without a row" in r["idle"] for r in two["ranks"])


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


# --- a whole recipe ----------------------------------------------------------------------------------------------


def test_a_recipe_under_accelerate_launch(tmp_path):
    model, rows = save_tiny_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", good_rows())
    write_config(
        tmp_path / "recipe.yaml",
        tiny_config(model, rows, train=dict(max_steps=3), evaluate=dict(samples=2, max_new_tokens=2)),
    )
    launch_config("ddp", 2, cpu=True, path=tmp_path / "two.yaml")
    train = ["-m", "ftbook.cli", "train", "recipe.yaml", "--out"]
    env = os.environ | dict(
        OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=os.pathsep.join(p for p in sys.path if p)
    )

    def said(*command):
        return subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240
        )

    run(tmp_path / "recipe.yaml", tmp_path / "alone", progress=False)
    both = said(*training_launch._command(tmp_path / "two.yaml", "-m")[1:-1], *train, "both", "--json")
    assert both.returncode == 0, both.stderr[-3000:]
    assert both.stdout.count('"loss_after"') == 1  # the first one speaks
    facts = [json.loads((tmp_path / k / "report.json").read_text()) for k in ("alone", "both")]
    assert (
        close(*([h["loss"] for h in f["history"]] for f in facts))
        and abs(facts[0]["loss_after"] - facts[1]["loss_after"]) < 1e-4
    )
    assert (
        [s["after"] for s in facts[0]["samples"]] == [s["after"] for s in facts[1]["samples"]]
        if "after" in facts[0]["samples"][0]
        else facts[0]["samples"] == facts[1]["samples"]
    )
    a, b = (load_file(tmp_path / k / "adapter" / "adapter_model.safetensors") for k in ("alone", "both"))
    assert a.keys() == b.keys() and all((a[n] - b[n]).abs().max() < 1e-4 for n in a)
