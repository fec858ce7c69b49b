"Errors and private helpers of ftbook.training.launch."
from fastcore.test import test_fail as check_fail
from ftbook.training.launch import run_processes


def test_oserror_1():
    def fails(): raise OSError('no such luck')
    check_fail(lambda: run_processes(fails, n=1), contains='no such luck')
