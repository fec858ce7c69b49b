"What `checkpoint_` refuses."

import pytest
from torch import nn

from ftbook.memory.step import small_model
from ftbook.memory.tricks import checkpoint_


def test_a_part_that_is_not_known_and_a_model_without_layers():
    with pytest.raises(ValueError, match="'attention' or 'mlp'"):
        checkpoint_(small_model(), only="norms")
    with pytest.raises(ValueError, match="every must be 1 or more"):
        checkpoint_(small_model(), every=0)
    with pytest.raises(ValueError, match="no layers"):
        checkpoint_(nn.Linear(2, 2))
