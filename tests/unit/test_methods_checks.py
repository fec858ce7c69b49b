"Errors and private helpers of ftbook.methods.checks."

from fastcore.test import test_fail as check_fail
from ftbook.methods.checks import check_number, refuse_fields


def test_check_number_1():
    check_fail(
        lambda: check_number('rank', 0, lambda r: r >= 1, 'at least 1'), contains='rank=0: it must be at least 1'
    )


def test_refuse_fields_1():
    refuse_fields(dict(peft_type='LORA', r=8, use_dora=False, bias='none'), ['r'], dict(bias=['none']))
    check_fail(lambda: refuse_fields(dict(r=8, use_dora=True), ['r']), contains='use_dora=True')
