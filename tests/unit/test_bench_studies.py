"The studies of the bench: plans that name their runs, and runs that say what they need."

import importlib, json
from collections import Counter

import pytest
from harness import Study, studies

from ftbook.problem import Problem

ON_GPU = [name for name in studies() if name.startswith("gpu_")]
MEMORY = [
    dict(model="llama", tokens=128),
    dict(model="bert", tokens=128),
    dict(model="llama", method="lora", tokens=256, rows=2),
]


@pytest.fixture
def no_gpu(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("name", ON_GPU)
def test_a_run_without_a_gpu_is_refused_at_once(name, no_gpu):
    study = Study(name)
    job = next(iter(study.module.plan([])))
    with pytest.raises(Problem) as caught:
        study.module.run(job)
    assert "CUDA" in caught.value.why and caught.value.remedy


def planned(name):
    study = Study(name)
    return Counter(study.key(job) for job in study.module.plan([]))


@pytest.mark.parametrize(
    ("name", "runs"),
    dict(
        gpu_context=1, gpu_nf4=12, gpu_steps=6, gpu_agree=11, gpu_memory=42, gpu_fewshot=120, gpu_fewshot_times=20
    ).items(),
)
def test_a_plan_needs_no_gpu_and_is_whole(name, runs, no_gpu):
    made = planned(name)
    assert sum(made.values()) == runs == len(made)


@pytest.mark.parametrize("name", [*ON_GPU, "lora_step", "memory", "memory_ladder", "memory_shapes", "qlora"])
def test_what_was_measured_is_planned(name):
    "No committed run has a name that the plan does not know, or is there more often than it is planned."
    study = Study(name)
    made = Counter(study.key(r) for r in study.read()["runs"])
    assert made and not made - planned(name)


def test_what_was_measured_of_training_is_planned():
    "Two machines made all rounds of their own."
    study = Study("training")
    names = {json.dumps([v, d, 2]) for d, variants in study.module.VARIANTS.items() for v in variants}
    assert {study.key(r) for r in study.read()["runs"]} == names


def test_shapes_are_planned_as_the_memory_study_plans_them():
    "A rung of the ladder on short rows has the bytes that were measured in its planned peak."
    shapes = importlib.import_module("studies.memory_shapes")
    rung = dict(ladder="LoRA on bfloat16", tokens=256)
    items = shapes.plan_rung(rung)["items"]
    committed = next(r for r in Study("memory").read()["runs"] if r.get("ladder") == rung["ladder"])
    assert sum(items.values()) == pytest.approx(committed["planned"], rel=0.01)


@pytest.mark.parametrize("configuration", MEMORY, ids=lambda c: f"{c['model']}-{c.get('method', 'full')}")
def test_a_run_of_memory_gives_what_is_committed(configuration):
    "The same fields, and the same bytes but for a few."
    study = Study("memory")
    job = study.module.DEFAULT | configuration
    committed = next(r for r in study.read()["runs"] if study.key(r) == study.key(job))
    found = study.module.run(job)
    assert committed.keys() - {"machine"} == (job | found).keys()
    assert found["planned"] == pytest.approx(committed["planned"], rel=1e-3)
    # what other tests of this process hold is in both
    above = [o["measured"] - o["before"] for o in (found, committed)]
    assert above[0] == pytest.approx(above[1], rel=1e-3)
    assert found["finetune"] == committed["finetune"]


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_the_variants_of_a_step_hold_the_same_numbers(dora):
    "On a small model, as on SmolLM2: differences from PEFT are those of rounding, and the same keys are trained."
    lora_step = importlib.import_module("studies.lora_step")
    found = in_turns_of(lora_step, lambda stack: lora_step.variants("float32", 12, dora, stack, tiny, row))
    assert found["seconds"].keys() == found["saved"].keys() == {"peft", "layers", "finetune", "frozen"}
    assert found["same"].keys() == {"layers", "finetune"}
    assert all(s["gradient"] < 1e-5 * max(1, found["largest_gradient"]) for s in found["same"].values())


def test_the_variants_of_a_step_in_four_bits_hold_the_same_numbers():
    pytest.importorskip("bitsandbytes")
    lora_step, qlora = (importlib.import_module(f"studies.{name}") for name in ("lora_step", "qlora"))
    found = in_turns_of(lora_step, lambda stack: qlora.variants("float32", 12, stack, tiny, row))
    assert found["seconds"].keys() == {"peft", "ours", "finetune", "dense"}
    assert all(s["gradient"] < 1e-4 * max(1, found["largest_gradient"]) for s in found["same"].values())


def in_turns_of(lora_step, variants):
    import contextlib

    with contextlib.ExitStack() as stack:
        return lora_step.in_turns(variants(stack), 2, lambda model, loss: lora_step.step(model, loss)[0])


def tiny(dtype, vocab_size=96):
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


def row(n):
    import torch

    return torch.randint(3, 96, (1, n), generator=torch.Generator().manual_seed(0))


def test_a_step_on_a_gpu_is_compared_as_on_a_processor(monkeypatch):
    gpu_steps = importlib.import_module("studies.gpu_steps")
    monkeypatch.setattr(gpu_steps, "random_model", lambda model, dtype, on: tiny(dtype))
    monkeypatch.setattr(gpu_steps, "differences", checked(gpu_steps.differences))
    ids = importlib.import_module("torch").randint
    monkeypatch.setattr("torch.randint", lambda low, high, size, **more: ids(low, 96, size, **more))
    found = gpu_steps.compared("lora", "tiny", "float32", 12, on="cpu", turns=2)
    committed = Study("gpu_steps").read()["runs"][0]
    assert set(found) == set(committed) - {*gpu_steps.KEY, "device", "machine"}
    assert {k: len(v) for k, v in found["seconds"].items()} == dict(peft=2, layers=2, finetune=2, frozen=2)
    assert found["same"].keys() == committed["same"].keys() == {"layers", "finetune"}


def checked(differences):
    "The frozen model has no gradients to compare."

    def compare(first):
        assert not first["frozen"][2]
        return differences(first)

    return compare


def test_four_bits_on_a_gpu_are_compared_as_on_a_processor():
    pytest.importorskip("bitsandbytes")
    gpu_nf4 = importlib.import_module("studies.gpu_nf4")
    found = gpu_nf4.compared("float32", "nf4", [64, 64], on="cpu")
    committed = Study("gpu_nf4").read()["runs"][0]
    assert set(found) == set(committed) - {*gpu_nf4.KEY, "device", "machine"}
    assert found["codes"] <= 1 and found["constants"] == 0 and found["bytes"] == 64 * 64 // 2


def test_losses_on_a_gpu_are_measured_as_on_a_processor(monkeypatch):
    gpu_agree = importlib.import_module("studies.gpu_agree")
    monkeypatch.setattr(gpu_agree, "random_model", lambda model, dtype, on: tiny(dtype, 40_000))
    found = [gpu_agree.trained("float32", None, False, fast, 8192, on="cpu", steps=2) for fast in (True, False)]
    committed = Study("gpu_agree").read()["runs"][0]
    assert set(found[0]) == set(committed) - {*gpu_agree.KEY, "device", "machine"}
    assert found[0]["losses"] == pytest.approx(found[1]["losses"], abs=1e-4) and len(found[0]["seconds"]) == 2


def test_the_rows_of_losses_are_those_that_were_measured():
    gpu_agree = importlib.import_module("studies.gpu_agree")
    rows = gpu_agree.rows()
    assert len(rows) == 64 and all(40 <= len(e) < 400 and e.n_targets == len(e) - 1 for e in rows)
    assert [e.index for e in rows] == list(range(64)) and rows[0].input_ids == gpu_agree.rows()[0].input_ids


def test_our_run_of_training_takes_the_order_of_the_rivals(monkeypatch):
    "One batch after the other, as they come, and afterwards `finetune` shuffles again."
    from ftbook.training import loop, tune

    training = importlib.import_module("studies.training")
    before, seen = loop.length_batches, []

    def finetune(model, examples, **settings):
        seen.extend(loop.length_batches(examples, settings["batch_size"], seed=0, epoch=0))
        return type("Run", (), dict(history=[]))()

    monkeypatch.setattr(tune, "finetune", finetune)
    training.ours(tiny("float32"), None, list(range(20)), None)
    assert seen == [list(range(8)), list(range(8, 16)), list(range(16, 20))] and loop.length_batches is before


def test_every_variant_of_training_has_the_same_losses(tmp_path, monkeypatch):
    "The Trainer, ours and every rung of the ladder, on a small model; the bound has no loss."
    import random
    import torch
    from ftbook.data.examples import Example

    monkeypatch.chdir(tmp_path)  # the Trainer wants a folder
    training, rng, examples = importlib.import_module("studies.training"), random.Random(0), []
    for i in range(16):
        ids = [3, 4, 5] + [rng.randrange(6, 96) for _ in range(rng.randrange(8, 20))]
        examples.append(Example(ids, [False] * 5 + [True] * (len(ids) - 5), index=i))
    given = type("Tokenizer", (), dict(pad_token_id=0)), examples, torch.float32
    variants = [v for v in training.VARIANTS["bfloat16"] if not v.startswith("sft")]
    found = {v: training.way(v)(tiny("float32"), *given) for v in variants}
    tokens = [sum(map(len, examples[:8])), sum(map(len, examples[8:]))]
    assert all(len(seconds) == 2 and n == tokens for seconds, n, _, _ in found.values())
    assert found.pop("bound")[2] == []
    assert all(losses == pytest.approx(found["trainer"][2], abs=1e-4) for _, _, losses, _ in found.values())
    assert len(found) == 9
