"What `fast_` changes outside of a model, and when that is undone."

import sys

from ftbook.memory.step import small_model
from ftbook.training.fast import fast_, slow_


def test_the_rotation_of_a_family_is_its_own_again_when_no_fast_model_is_left():
    one, two = small_model(2), small_model(2)
    file = sys.modules[type(one).__module__]
    own = file.apply_rotary_pos_emb
    fast_(one)
    fast_(two)
    swapped = file.apply_rotary_pos_emb
    slow_(one)
    assert file.apply_rotary_pos_emb is swapped is not own, "the other model is still fast"
    slow_(two)
    assert file.apply_rotary_pos_emb is own
