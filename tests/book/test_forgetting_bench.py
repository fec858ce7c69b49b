"What the bench on forgetting reads from its runs."

import pytest
import json

from harness import Study
from studies import forgetting as bench
from ftbook.forgetting import lost as forgetting_lost, report as forgetting_report


# What the bench reads from its runs


def made_run(variant, seed=0, right=(0.5, 0.6, 0.7, 0.8), end=None, other=(1.0, 1.0), sequence='domains'):
    "A run whose tasks are right so often after their own training, and at the end; .5 and a loss of 1 before."
    tasks = bench.SEQUENCES[sequence]

    def stage(accuracy, text):
        return dict(accuracy=dict(zip(tasks, accuracy)), loss=dict.fromkeys(tasks, 1.0), other=dict(a=text, b=text))

    stages = (
        [stage([0.5] * 4, other[0])]
        + [stage([right[i] if i == k else 0.5 for i in range(4)], other[0]) for k in range(3)]
        + [stage(end or right, other[1])]
    )
    return dict(
        sequence=sequence,
        variant=variant,
        seed=seed,
        **bench.VARIANTS[variant],
        stages=stages,
        steps=[1] * 4,
        train_cpu_seconds=1.0,
    )


def test_learnt_is_counted_against_the_base_and_lost_at_the_end():
    run = made_run('full 1e-05', right=(0.6, 0.7, 0.8, 0.9), end=(0.5, 0.5, 0.5, 0.9), other=(2.0, 2.5))
    assert (
        bench.learnt(run) == pytest.approx(0.25)
        and bench.kept(run) == pytest.approx(0.1)
        and bench.lost(run) == pytest.approx(0.5)
    )


def test_explanations_are_counted_in_nats():
    def stage(movie, jargon):
        return dict(accuracy=dict(movie=movie, jargon=None), loss=dict(movie=1.0, jargon=jargon), other=dict(a=1.0))

    run = dict(sequence='explaining', stages=[stage(0.5, 4.0), stage(0.8, 5.0), stage(0.7, 3.0)])
    assert bench.learnt(run) == pytest.approx(1.0) and bench.fell(run) == pytest.approx(0.5)


@pytest.mark.parametrize('level, paid', [(0, 0.0), (0.05, 0.1), (0.1, 0.2), (0.11, 2.1), (0.13, None)])
def test_the_least_that_is_paid_for_so_much(level, paid):
    found = bench.price([(0.0, 0.0), (0.1, 0.2), (0.12, 4.0), (0.1, 5.0)], level)
    assert found is None if paid is None else found == pytest.approx(paid)


def test_a_remedy_is_set_against_the_cheapest_rate_that_learns_as_much():
    runs = [
        made_run(f'full {lr:g}', right=[0.5 + gain] * 4, other=(1.0, 1.0 + cost))
        for lr, gain, cost in zip(bench.RATES['full'], (0.1, 0.2, 0.3, 0.2), (0.1, 0.4, 0.9, 3.0))
    ]
    remedy = made_run('full, replay 0.5', right=[0.72] * 4, other=(1.0, 1.1))
    # to two points, as much as the second rate
    assert bench.spared([*runs, remedy], remedy) == pytest.approx(0.4 - 0.1)
    # more than any rate learns: against the one that learns most
    better = made_run('full, replay 0.5', right=[0.9] * 4, other=(1.0, 1.1))
    assert bench.spared([*runs, better], better) == pytest.approx(0.4 + 0.5 * 0.8 - 0.1)


def test_the_other_seeds_run_the_better_strength():
    runs = [made_run(v, right=[0.6] * 4, other=(1.0, 1.0 + 0.1 * i)) for i, v in enumerate(bench.VARIANTS)]
    chosen = bench.chosen(runs)
    assert (
        bench.chosen(runs[:-1]) == []
        and 'full, replay 0.2' in chosen
        and 'full, replay 0.5' not in chosen
        and 'lora, rank 64' in chosen
    )
    assert all(v in chosen for v in ('full 1e-05', 'lora 0.003', 'full, freeze 15'))


def test_shares_of_the_work_are_apart_and_whole(tmp_path):
    study = Study('forgetting', tmp_path)
    parts = [[study.key(j) for j in study.missing(share=(i, 3))] for i in range(3)]
    assert sorted(sum(parts, [])) == sorted(study.key(j) for j in study.missing()) and all(len(p) > 3 for p in parts)


def test_a_report_escapes_names_and_answers(tmp_path):
    evil = "<script>alert(1)</script>"
    lost = forgetting_lost.Forgetting(evil, 1.0, 1.1, 0.1, 0.05, 0.2, 4, 50)
    moved = [dict(name=evil, share=0.1, rank=1.0)]
    report = forgetting_report.ForgettingReport(
        {evil: lost}, {evil: (1, 2, 3)}, (0.1, 0.0, 0.2), (1, 1, 1), [(evil, evil, evil)], (0.1, 0.0, 0.2), moved
    )
    html = report.html()
    assert "<script" not in html and html.count("&lt;script&gt;") > 5
    assert "<script" not in report._repr_html_() and "&lt;script&gt;" in report._repr_html_()
    folder = report.save(tmp_path / "lost")
    assert json.loads((folder / "report.json").read_text()) == report.facts()
