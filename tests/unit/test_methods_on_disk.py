"What every method writes and reads: names, tensors, a configuration in PEFT's words."

import re

import pytest, torch
from torch import nn

from ftbook.methods.bitfit import BitFit
from ftbook.methods.bottleneck_method import Bottleneck
from ftbook.methods.ia3 import IA3
from ftbook.methods.lora_method import LoRA
from ftbook.methods.p_tuning import PTuning
from ftbook.methods.parts import Part, parts_of
from ftbook.methods.prefix_tuning import PrefixTuning
from ftbook.methods.prompt_tuning import PromptTuning
from ftbook.problem import Problem
from tiny import random_batch, seeded, small_qwen

methods = [LoRA(rank=2), IA3(), BitFit(), PromptTuning(3), PrefixTuning(3), PTuning(3)]
every_method = pytest.mark.parametrize("method", methods, ids=lambda m: type(m).__name__)


def make():
    return seeded(small_qwen).eval()


def moved(method):
    "A model with the method on it, every trained number changed."
    model = method.apply(make())
    with torch.no_grad():
        for n in model.ftbook_added:
            p = model.get_parameter(n)
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))))
    return model


@every_method
def test_a_configuration_comes_back(method):
    again = type(method).from_peft(method.to_peft(method.apply(make())))
    fields = (
        {"num_virtual_tokens": 3}
        if hasattr(method, "num_virtual_tokens")
        else {"rank": 2}
        if type(method) is LoRA
        else {}
    )
    assert all(getattr(again, k) == v for k, v in fields.items())
    assert (
        again.shapes(make()).keys() == type(again).from_peft(again.to_peft(again.apply(make()))).shapes(make()).keys()
    )


@every_method
def test_a_file_is_checked_and_then_fills_a_model(method):
    model, fresh = moved(method), make()
    file = {k: t.detach().clone() for k, t in method.tensors(model).items()}
    reader = type(method).from_peft(method.to_peft(model))
    reader.check_tensors(fresh, file)
    key = next(iter(file))
    with pytest.raises(Problem, match=re.escape(key)):
        reader.check_tensors(fresh, {k: t for k, t in file.items() if k != key} | {"another": file[key]})
    reader.apply(fresh)
    reader.fill_(fresh, file)
    ids = random_batch(60)["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(fresh(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


@every_method
def test_every_key_is_that_of_peft(method):
    model = moved(method)
    assert all(method.key(n).startswith("base_model.") for n in model.ftbook_added)
    if isinstance(method, (LoRA, IA3)):
        assert {method.key(n) for n in model.ftbook_added} == method.tensors(model).keys()


def test_targets_that_the_model_lacks_are_left_out():
    assert LoRA(target_modules=["q_proj", "nowhere"]).present(make()).target_modules == ["q_proj"]


def test_a_bottleneck_says_where_it_goes():
    method, model = Bottleneck("houlsby", 4), make()
    assert list(method.places(model)) == [f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn", "mlp")]
    shapes = method.shapes(model)
    assert len(shapes) == 4 * 4 and {s for s in shapes.values()} == {(4, 32), (4,), (32, 4), (32,)}
    method.inject_(model)
    assert list(parts_of(model)) == list(method.places(make()))
    assert method.to_peft(model)["bottleneck_size"] == 4


def test_a_method_comes_off_and_only_changes_of_weights_merge():
    method, model = IA3(), IA3().apply(make())
    method.check_merge(model)
    method.eject_(model)
    assert not parts_of(model)
    adapters = Bottleneck("pfeiffer", 4).apply(make())
    with pytest.raises(ValueError, match="BottleneckPart cannot be merged"):
        adapters.ftbook_method.check_merge(adapters)


class Doubled(Part):
    def merged_tensors(self):
        return {"weight": 2 * self.base.weight}


def test_a_part_that_changes_no_weights_cannot_be_merged():
    plain, doubled = Part(nn.Linear(2, 2)), Doubled(nn.Linear(2, 2))
    assert plain.merged_tensors() == {}
    with pytest.raises(ValueError, match="Part cannot be merged"):
        plain.check_merge()
    doubled.check_merge()
    assert torch.equal(doubled.merged_tensors()["weight"], 2 * doubled.base.weight)
