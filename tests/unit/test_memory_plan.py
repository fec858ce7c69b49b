"Names that a plan takes, and sizes that cannot be."

import pytest

from ftbook.memory.advice import advise, longest_sequence
from ftbook.memory.plan import _named_methods, as_method, as_quantizer, plan
from ftbook.memory.step import small_config, small_model
from ftbook.methods.lora_method import LoRA
from ftbook.methods.quant import quantize_


def test_nothing_fits_in_nothing():
    assert longest_sequence(small_config(), memory_gib=0.001) == 0
    with pytest.raises(ValueError, match="given in GiB"):
        longest_sequence(small_config(), memory_gib=-4)


def test_methods_have_the_names_of_a_recipe():
    from ftbook.recipe.config import METHODS

    known = _named_methods()
    assert known.keys() == METHODS.keys()
    for name, (cls, fixed, _) in METHODS.items():
        made = as_method(name)
        assert made is None if cls is None else type(made) is cls
        assert all(getattr(made, k) == v for k, v in fixed.items())


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int4", "int8"])
def test_a_plan_by_name_is_the_plan_by_object(kind):
    by_name = plan(small_config(2), "lora", quantize=kind, seq_len=16)
    by_object = plan(small_config(2), LoRA(), quantize=lambda m: quantize_(m, kind), seq_len=16)
    assert by_name.items == by_object.items and by_name.items["weights, quantised"] > 0


def test_every_method_is_planned_by_its_name():
    for name in _named_methods():
        p = plan(small_config(2), name, seq_len=16)
        assert ("adapters" in p.items) == (name != "full"), name


def test_names_that_are_not_known():
    with pytest.raises(ValueError, match="method must be one of lora, .*, or an object with `apply`, not 'qlora'"):
        plan(small_config(), "qlora")
    with pytest.raises(ValueError, match="quantize must be one of nf4, .*, or a function, not 'nf3'"):
        plan(small_config(), "lora", quantize="nf3")
    assert as_quantizer(quantize_) is quantize_


def test_advice_takes_names_too():
    gpu = 0.99 * plan(small_config(2), seq_len=64).peak / 2**30
    how = dict(memory_gib=gpu, seq_len=64, offered=dict(method="lora", quantize="nf4"))
    named, unnamed = (advise(small_config(2), method, **how) for method in ("full", None))
    assert named == unnamed and named[-1]["fits"] and named[-1]["change"] == "train an adapter"


def test_a_plan_lays_rows_out_as_training_does(monkeypatch):
    from ftbook.data.layouts import Layout
    from ftbook.memory import account, plan as module

    seen = []
    full_batch = account.full_batch

    def note(model, packs, *size):
        seen.append(packs)
        return full_batch(model, packs, *size)

    monkeypatch.setattr(account, "full_batch", note)
    plan(small_model(2), seq_len=24, batch_size=4)
    monkeypatch.setattr(module, "layout_of", lambda model: Layout("right", "its rows do not keep apart"))
    plan(small_model(2), seq_len=24, batch_size=4)
    assert seen[0] is True and seen[-1] is False
