"Errors and private helpers of ftbook.models.device."

from fastcore.test import test_fail as check_fail
from ftbook.models.device import _is_there, probe_device


def test_next_1():
    absent = next(k for k in ('cuda', 'xpu', 'mps') if not _is_there(k))
    check_fail(lambda: probe_device(absent), contains=f'no {absent} device here')
