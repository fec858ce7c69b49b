"Packs: what is refused, and what examples share at their beginning."

import pytest

from ftbook.data.examples import Example
from ftbook.data.packs import length_batches, pack, shared_prefix


def example(ids, targets=1):
    "An example whose last tokens are targets."
    return Example(list(ids), [False] * (len(ids) - targets) + [True] * targets, index=7)


def test_a_row_that_no_pack_can_hold_is_named():
    with pytest.raises(ValueError, match="row 7 has 30 tokens, more than a pack of 20: raise max_tokens"):
        pack([example(range(30))], 20)


def test_a_batch_holds_at_least_one_row():
    with pytest.raises(ValueError, match="batch_size must be 1 or more, not 0"):
        length_batches([example(range(4))], 0)


same = [example([*range(12), last]) for last in (50, 60)]


def test_the_opening_ends_before_the_token_in_front_of_the_first_target():
    assert shared_prefix(same) == 11


def test_one_row_shares_nothing():
    assert shared_prefix(same[:1]) == 0


def test_a_short_opening_is_not_worth_sharing():
    assert shared_prefix([example([*range(7), last]) for last in (50, 60)]) == 0


def test_the_opening_is_kept_once():
    (packed,) = pack(same, share=True)
    assert packed.input_ids[0].tolist() == [*range(11), 11, 50, 11, 60]
    assert packed.position_ids[0].tolist() == [*range(11), 11, 12, 11, 12]
    assert packed.n_targets == 2 and packed.lengths == [11, 2, 2]
