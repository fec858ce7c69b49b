"Errors and private helpers of ftbook.choose.surface."

from fastcore.test import test_fail as check_fail
from ftbook.choose.surface import explained, Surface
from ftbook.choose.sweep import load_sweep, MEASURES


def test_all_1():
    sweep = load_sweep('bench/results/sweep.parquet')

    def lora_runs(task):
        return sweep.of(('design', 'best'), task=task, method='lora')

    guesses = {(t, m): Surface(lora_runs(t), m) for t in sweep.tasks for m in MEASURES}
    assert all(explained(guesses[t, 'cpu_seconds']) > 0.3 for t in sweep.tasks)
    check_fail(lambda: Surface(lora_runs(sweep.tasks[0])[:3]), contains='8 runs or more')
