"What the shipped runs let a surface explain."

import pytest

from ftbook.choose.surface import explained, Surface
from ftbook.choose.sweep import load_sweep


@pytest.mark.parametrize('task', ['movie', 'newsgroups'])
def test_the_shipped_runs_explain_what_a_run_costs(task):
    runs = load_sweep().of(('design', 'best'), task=task, method='lora')
    assert explained(Surface(runs, 'cpu_seconds')) > 0.3
