"Errors of ftbook.methods.lora_method."

import math

import pytest
from torch import nn

from ftbook.methods.lora_method import LoRA


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(rank=0), "at least 1"),
        (dict(rank=2.5), "a whole number"),
        (dict(alpha=0), "above 0"),
        (dict(alpha=math.inf), "finite"),
        (dict(dropout=1), "below 1"),
        (dict(target_modules=[]), "is empty"),
    ],
)
def test_a_wrong_setting_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        LoRA(**wrong)


@pytest.mark.parametrize(
    "method, said",
    [
        (LoRA(rank=4), "rank=4 is larger than out"),
        (LoRA(rank=2, target_modules=["query"]), r"q_proj \(1\), out \(1\)"),
    ],
)
def test_a_method_that_does_not_fit_leaves_the_model_alone(method, said):
    model = nn.ModuleDict({"q_proj": nn.Linear(6, 6, bias=False).requires_grad_(False), "out": nn.Linear(6, 3)})
    with pytest.raises(ValueError, match=said):
        method.apply(model)
    assert model["out"].weight.requires_grad and type(model["q_proj"]) is nn.Linear
