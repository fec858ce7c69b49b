"Memory that ran out, and plans that cannot be."

import pytest, torch
from transformers import AutoModelForCausalLM

from ftbook.memory import failures as memory_failures
from ftbook.memory import plan as memory_plan
from ftbook.training import tune as training_tune
from ftbook.methods.lora_method import LoRA
from ftbook.memory.plan import GIB, plan
from ftbook.memory.failures import explain_out_of_memory
from ftbook.training.settings import Settings
from cases.memory import llama


def test_what_ran_out():
    p = plan(llama(), seq_len=64)
    assert (
        "too much" in explain_out_of_memory(p, p.peak / GIB / 2)
        and "to spare" in explain_out_of_memory(p, 1)
        and "more than planned" in explain_out_of_memory(p, 1, 2 * p.peak)
    )


def trained(model, error, **how):
    "A run of `finetune` that dies in its second step."
    from ftbook.data.examples import Example

    def die(state):
        if state.step == 2:
            raise error

    rows = [Example([1] * 40, [False] + [True] * 39) for _ in range(8)]
    with memory_failures.explaining_out_of_memory(
        model, lambda: memory_plan.plan_run(model, rows, Settings(batch_size=2), **how)
    ):
        training_tune.finetune(model, rows, batch_size=2, callbacks=[die], progress=False)


cuda_says = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.69 GiB"
)
cpu_says = RuntimeError(
    
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 2147483648 bytes. Error code 12 (Cannot allocate memory)"
    
)


@pytest.mark.parametrize("error", [cuda_says, cpu_says], ids=["GPU", "CPU"])
def test_a_run_that_dies_says_which_item_was_exceeded(error):
    model = AutoModelForCausalLM.from_config(llama())
    # planned without moments
    with pytest.raises(
        type(error), match="(?s)optimizer states, .* instead of 0.00, .* above the plan.*ried to allocate"
    ) as e:
        trained(model, error, optimizer="sgd")
    assert e.value.__cause__ is error
    # as planned, but for two GiB
    with pytest.raises(type(error), match="(?s)activations or what passes through.*rows longer than 40 tokens"):
        trained(AutoModelForCausalLM.from_config(llama()), error)
    assert memory_failures._asked(str(error)) == 2**31


def test_a_real_refusal_is_known_and_another_error_is_left_alone():
    model = AutoModelForCausalLM.from_config(llama())
    with (
        pytest.raises(RuntimeError) as e,
        memory_failures.explaining_out_of_memory(model, lambda: plan(model, seq_len=64)),
    ):
        torch.empty(2**50, dtype=torch.uint8)
    assert (
        "the plan wants" in str(e.value)
        and memory_failures.is_out_of_memory(e.value.__cause__)
        and memory_failures._asked(str(e.value.__cause__)) == 2**50
    )

    def never():
        raise AssertionError

    with pytest.raises(RuntimeError, match="^something else$"), memory_failures.explaining_out_of_memory(model, never):
        raise RuntimeError("something else")
    with memory_failures.explaining_out_of_memory(model, never):
        pass


@pytest.mark.parametrize(
    "how, said",
    [
        (dict(seq_len=0), "seq_len must be"),
        (dict(batch_size=-1), "batch_size must be"),
        (dict(dtype="int3"), "dtype must be one of"),
        (dict(optimizer="adam9"), "optimizer must be one of"),
        (dict(precision="float16", mixed=True), "needs a GPU"),
        (dict(precision="fp8"), "precision must be"),
        (dict(precision="float32", mixed=True), "leave mixed out"),
        (dict(precision="bfloat16", dtype="float32"), "leave one of them out"),
        (dict(device="tpu"), "'cpu' or 'cuda'"),
        (dict(sharding="zero9"), "sharding must be"),
        (dict(sharding="ddp", n_devices=0), "n_devices must be"),
    ],
)
def test_errors_say_what_to_do(how, said):
    with pytest.raises(ValueError, match=said):
        plan(llama(), **how)


def test_more_errors():
    with pytest.raises(ValueError, match="Shipped with ftbook"):
        plan("no-such-model")
    with pytest.raises(ValueError, match="matches nothing"):
        plan(llama(), LoRA(target_modules=["nothing_here"]))
    with pytest.raises(ValueError, match="nothing of the model"):
        plan(AutoModelForCausalLM.from_config(llama()).requires_grad_(False))
    for gib in (0, -1, float("nan"), "24", 1e9):
        with pytest.raises(ValueError, match="given in GiB"):
            plan(llama(), seq_len=64).fits(gib)
