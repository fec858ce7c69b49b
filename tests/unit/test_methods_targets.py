"Errors of ftbook.methods.targets."

import pytest
from torch import nn

from ftbook.methods.targets import find_modules


@pytest.fixture
def model():
    block = {"q_proj": nn.Linear(2, 2), "k_proj": nn.Linear(2, 2)}
    return nn.ModuleDict({"embed_tokens": nn.Embedding(3, 2), "a": nn.ModuleDict(block)})


def test_a_target_that_matches_nothing_is_refused_with_what_would(model):
    with pytest.raises(ValueError, match=r"'query'\] matches nothing.*q_proj \(1\), k_proj \(1\)"):
        find_modules(model, ["q_proj", "query"])


def test_a_target_that_is_no_linear_layer_is_named_with_its_kind(model):
    with pytest.raises(ValueError, match="embed_tokens is of type Embedding"):
        find_modules(model, ["embed_tokens"])
