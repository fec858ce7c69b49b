"More than one device: two processes against one."

import json, os, subprocess, sys
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file

from book import root
from ftbook.training import launch as training_launch
from ftbook.recipe.run import run
from ftbook.training.launch import launch_config, run_processes
from ftbook.training.checkpoints import checkpoints, read_checkpoint
from tiny import good_rows, save_tiny_model, tiny_config, write_config, write_rows


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

    sys.path[:0] = tests
    import torch
    from test_processes import in_one
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
        tests=[str(root / "tests"), str(Path(__file__).parent)],
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
