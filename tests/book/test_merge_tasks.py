"The runs on real tasks: what the study does to tensors, and that the lesson's explorers move."

import itertools, os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from book import directives, nbs, read_cells
from ftbook.merging.recipes import RECIPES
from ftbook.merging.explorers import MergeButton, job_of
from ftbook.merging.task_runs import right
from ftbook.merging.vectors import conflicts
from ftbook.merging.states import merge_states
from harness import Study, write_results
from studies import merge_tasks as study

bench = nbs / 'bench'


@pytest.fixture
def small(monkeypatch):
    "Three fine-tunes of a base with two tensors, in place of the real ones."
    rng = torch.Generator().manual_seed(0)
    draw = lambda: {'a': torch.randn(40, 30, generator=rng), 'b': torch.randn(50, generator=rng)}
    base = draw()
    states = dict(base=base) | {t: {k: base[k] + 0.1 * v for k, v in draw().items()} for t in study.THREE}
    monkeypatch.setattr(study, 'state', states.__getitem__)
    study.trimmed.cache_clear()
    yield states
    study.trimmed.cache_clear()


@pytest.mark.parametrize('density, normalize', list(itertools.product((0.2, 0.5), (True, False))))
def test_trimming_first_is_ties(small, density, normalize):
    weights = [0.5, 1.0, 0.25]
    want = merge_states(
        'ties', small['base'], [small[t] for t in study.THREE], weight=weights, density=density, normalize=normalize
    )
    got = study.merged('ties', study.THREE, weights, density=density, normalize=normalize)
    for k in want:
        torch.testing.assert_close(got[k], want[k], atol=1e-6, rtol=0)


def test_thinning_is_that_of_the_merge(small):
    "A merge with one weight of 1 has the entries of that model alone, grown."
    for i, t in enumerate(study.THREE):
        thin, density = study.thinned(t, i, 0.5), 0.5
        got = study.merged('dare_linear_paper', study.THREE, [float(j == i) for j in range(3)], density=density)
        for k, b in small['base'].items():
            torch.testing.assert_close(got[k] - b, (thin[k] - b) / density, atol=1e-6, rtol=0)


def test_counts_are_those_of_conflicts(small):
    models = [small[t] for t in study.THREE]
    n, moved, against = study.entry_counts(models)
    flat = torch.stack([torch.cat([(m[k] - b).flatten() for k, b in small['base'].items()]) for m in models])
    assert n == flat.shape[1] and against / moved == pytest.approx(conflicts(flat))
    cosine = torch.nn.functional.cosine_similarity(flat[0].double(), flat[1].double(), dim=0)
    assert study.clash(study.THREE[:2], 'ties', 1.0)['cosine'] == pytest.approx(float(cosine), abs=2e-5)


def test_a_run_that_was_written_is_not_planned_again(tmp_path):
    mine, plan = Study('merge_tasks', tmp_path), list(study.plan([]))
    write_results(mine.path, dict(machines=[], runs=[plan[-20]]))
    left = mine.missing()
    assert plan[0] in left and plan[-20] not in left and len(left) == len(plan) - 1


def test_methods_of_no_grid(small):
    "Every method that is planned merges what the study gives it, and those without weights find their own."
    for tasks, method, given, weights in study.others():
        found = study.merged(method, tasks, weights, **given)
        assert all(t.isfinite().all() and not torch.equal(t, small['base'][k]) for k, t in found.items())
    halfway = study.merged('slerp', study.PAIR, (0.5, 0.5))
    torch.testing.assert_close(
        halfway['b'], merge_states('karcher', None, [small[t] for t in study.PAIR])['b'], atol=0.02, rtol=0
    )


def test_every_method_is_planned():
    "One of each family that the chapter has, but for the single model."
    planned = {job[2] for job in study.jobs() if job[0] not in ('conflict', 'search')}
    family = lambda name: name.replace('_paper', '').replace('_ties', '').replace('_linear', '')
    assert {family(n) for n in RECIPES} - {'passthrough'} <= {family(m) for m in planned}


# The page


@pytest.fixture(scope='module')
def lesson():
    "The names of the lesson, as a reader who has run it has them."
    names = {'get_ipython': lambda: SimpleNamespace(kernel=True)}  # as in Jupyter: the page keeps its names
    here = Path.cwd()
    os.chdir(bench.parent)
    try:
        for c in read_cells(bench.parent / '23_merging_tasks.ipynb', 'code'):
            if directives(c).get('eval') != 'false' and 'get_ipython' not in c['source']:
                exec(c['source'], names)
    finally:
        os.chdir(here)
    return names


EXPLORERS = 'by_task', 'merge_weights', 'merge_three'


@pytest.mark.parametrize('name', EXPLORERS)
def test_every_control_moves_something(lesson, name):
    "From the state in which the page opens."
    shown = lesson[name]
    start = shown._key()
    for i, control in enumerate(shown.controls):
        others = [start[:i] + (k,) + start[i + 1 :] for k in range(len(control.options)) if k != start[i]]
        assert others and all(shown.frame(k) != shown.picture for k in others), control.name


@pytest.mark.parametrize('name, part', [('merge_weights', 'plane'), ('merge_three', 'triangle')])
def test_points_say_what_they_are(lesson, name, part):
    "A point that was measured has the run's score, and any other one says between whom it stands."
    shown, runs = lesson[name], {}
    for r in lesson['measured'].part(part):
        runs[r['method'], str(r['settings']), tuple(r['weights'])] = right(r)
    kinds = set()
    for key in itertools.product(*(range(len(c.options)) for c in shown.controls)):
        f = shown.result(key)
        if not f['scores']:
            kinds.add('nothing')
            assert 'was not measured at density' in f['origin']
        elif len(f['shares']) == 1 and any(f['at']):
            kinds.add('measured')
            method, given, weights = job_of(f)
            assert f['scores'] == runs[method, str(given), tuple(round(w, 4) for w in weights)]
            assert f['origin'].startswith('measured')
        elif len(f['shares']) > 1:
            kinds.add('between')
            assert f['origin'].startswith('not measured: between')
            assert sum(f['shares'].values()) == pytest.approx(1)
    assert {'measured', 'between'} <= kinds


def test_the_button(lesson):
    "It merges at the point where the sliders stand, says what it does, and says what went wrong."
    pytest.importorskip('ipywidgets')
    calls = []

    def made(tasks, job, say):
        calls.append((tasks, job))
        say('merging, and asking')
        return dict.fromkeys(tasks, 0.5)

    button = MergeButton(lesson['merge_three'], made)
    assert 'model_id' in button._repr_mimebundle_()['application/vnd.jupyter.widget-view+json']
    button.button.click()
    assert calls == [(study.THREE, job_of(lesson['merge_three'].value))]
    assert button.said.value.startswith('made just now: products 0.500') and not button.button.disabled

    def failed(*given):
        raise ValueError('<no such model>')

    button.made = failed
    button.button.click()
    assert button.said.value == '&lt;no such model&gt;' and not button.button.disabled
