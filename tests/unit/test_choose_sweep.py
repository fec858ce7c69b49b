"Errors and private helpers of ftbook.choose.sweep."

from fastcore.test import test_fail as check_fail
import tempfile
from pathlib import Path

from ftbook.choose.sweep import load_sweep


def test_path_1():
    bad = Path(tempfile.mkdtemp()) / 'sweep.parquet'
    check_fail(lambda: load_sweep(bad), contains='there is no sweep')
    bad.write_text('part,task')
    check_fail(lambda: load_sweep(bad), contains='is not Parquet')
