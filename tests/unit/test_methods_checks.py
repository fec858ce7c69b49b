"Errors of ftbook.methods.checks."

import pytest

from ftbook.methods.checks import check_number, refuse_fields


def test_a_number_out_of_range_is_named():
    with pytest.raises(ValueError, match="rank=0: it must be at least 1"):
        check_number("rank", 0, lambda r: r >= 1, "at least 1")


@pytest.mark.parametrize("value", [True, "8", None])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(ValueError, match="it must be at least 1"):
        check_number("rank", value, lambda r: r >= 1, "at least 1")


def test_a_field_that_would_be_ignored_is_refused_unless_it_changes_nothing():
    refuse_fields(dict(peft_type="LORA", r=8, use_dora=False, bias="none"), ["r"], dict(bias=["none"]))
    with pytest.raises(ValueError, match="use_dora=True"):
        refuse_fields(dict(r=8, use_dora=True), ["r"])
