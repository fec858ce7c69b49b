"Charts, tables and explorers as Python makes them."

import base64, json, math, re, sys, xml.dom.minidom, zlib

import pytest

from ftbook.show.axes import _Axis, tidy
from ftbook.show.bar_chart import bars
from ftbook.show.charts import Frame, plot
from ftbook.show.controls import Control
from ftbook.show.drawing import drawing, label, tile
from ftbook.show.explorer import explore
from ftbook.show.page import escape, page, Picture
from ftbook.show.stacks import stacked_bars
from ftbook.show.tables import table
from cases.explore import gallery, trained, two_kinds


# ---- an explorer's output, and the widget that a kernel follows


def test_an_output_is_html_that_a_sanitizer_leaves_a_picture_of():
    ex = two_kinds()
    bundle = ex._repr_mimebundle_()
    assert set(bundle) == {'text/plain', 'text/html'} and bundle['text/html'] == ex.html
    assert 'DecompressionStream' in ex.html
    assert '<svg' not in ex.html and ex.html.count('src="data:image/svg+xml;base64,') == 1
    assert not re.search('<(input|select|label|output)', ex.html), 'dead controls, or only their labels'
    json.dumps(bundle)


def test_widget_and_controls_follow_each_other():
    ex = two_kinds()
    slider, menu, check, shown = ex.widget.children
    slider.value, menu.value, check.value = 3, 0, True
    assert (ex.controls.rank.value, ex.controls.kind.value, ex.controls.bias.value) == (64, 'square', True)
    assert shown.value == ex.frame((3, 0, 1)).html
    ex.controls.rank.value, ex.controls.bias.value = 1, False
    assert (slider.value, check.value, shown.value) == (0, False, ex.frame((0, 0, 0)).html)
    assert ex.value == trained(1, 'square', False)


def test_the_same_cell_saves_the_same_output():
    a, b = two_kinds(), two_kinds()
    assert a._repr_mimebundle_() == b._repr_mimebundle_()


def test_without_ipywidgets_an_explorer_is_shown(monkeypatch):
    monkeypatch.setitem(sys.modules, 'ipywidgets', None)
    assert set(two_kinds()._repr_mimebundle_()) == {'text/plain', 'text/html'}


def test_frames_are_stored_once_and_in_order():
    ex = explore(lambda k, on: k if on else 0, lambda v: Picture(f'<b>{v}</b>'), k=[0, 1, 2], on=True)
    data = json.loads(zlib.decompress(base64.b64decode(re.search(r'data-frames="([^"]+)"', ex.html)[1])))
    assert data == dict(frames=['<b>0</b>', '<b>1</b>', '<b>2</b>'], index=[0, 0, 0, 1, 0, 2])


def test_compute_runs_once_per_combination():
    calls = []
    ex = explore(lambda k: calls.append(k) or k, lambda v: Picture(str(v)), k=[1, 2, 3])
    ex._repr_mimebundle_()
    ex.html
    ex.value
    assert sorted(calls) == [1, 2, 3]


# ---- charts: legible at any width, in light and in dark


def test_charts_are_lean_and_repeatable():
    for name, picture in gallery().items():
        assert len(picture.html) < 12_000, (name, len(picture.html))
        assert not re.search(r'\bid=|https?://(?!www\.w3\.org)|<style|<script|\bnan\b|\binf\b', picture.html), name
        xml.dom.minidom.parseString(picture.svg)
        xml.dom.minidom.parseString(picture.html)
    assert gallery() == gallery()


def test_text_from_data_stays_text():
    evil = '<img src=x onerror="alert(1)">'
    for picture in (
        plot({evil: ([1, 2], [1, 2]), 'b': ([1], [2])}, title=evil, x_label=evil, y_label=evil, marks={evil: 1}),
        bars({evil: {evil: 1, 'b': 2}}, title=evil, x_label=evil),
        table([{evil: evil}], title=evil),
        stacked_bars({evil: {evil: 1, 'b': 2}}, unit=evil, title=evil, marks={evil: 1}),
        drawing(9, 9, evil, tile(0, 0, (4, 4), evil), label(1, 1, evil), titled=True),
    ):
        assert '<img' not in picture.html and '<img' not in picture.svg
    assert '<img' not in page(evil, (evil, evil))
    assert '<img' not in explore(lambda a: a, lambda v: Picture('x'), a=Control([evil, 'b'], label=evil)).html


def test_values_that_are_not_finite_are_left_out_and_counted():
    p = plot({'loss': (range(5), [5, math.inf, 3, math.nan, None])})
    assert '3 values not finite and left out' in p.html
    assert len(re.findall('M', re.search(r'<path[^>]* d="([^"]+)"', p.html)[1])) == 2
    meant = plot({'crosses': ([1, 2, math.nan, 1, 1], [1, 1, math.nan, 0, 2])})
    assert (
        'not finite' not in meant.html
        and len(re.findall('M', re.search(r'<path[^>]* d="([^"]+)"', meant.html)[1])) == 2
    )


def test_names_may_be_numbers():
    assert '>16</text>' in plot({16: ([1, 2], [1, 2]), 32: ([1, 2], [1, 3])}).html
    assert '>16</text>' in bars({16: 1.0}).html


def test_marks_outside_a_fixed_range_are_not_drawn():
    assert 'far' not in plot({'': ([0, 1], [0, 1])}, marks={'far': 9}, frame=Frame(x_range=(0, 1))).html


def test_any_finite_numbers_make_a_chart():
    import random

    random.seed(0)
    for _ in range(300):
        n, log = random.choice([1, 2, 3, 30]), random.random() < 0.5
        one = lambda: (
            random.choice([0, 1, 1, -1]) ** (not log) * 10 ** random.uniform(-100, 100)
            if random.random() < 0.3
            else random.choice([1, 2, 1e9, 1e9 + 1, 1e-7])
        )
        xs, ys = [one() or 1 for _ in range(n)], [one() or 1 for _ in range(n)]
        for p in (plot({'a': (xs, ys)}, {'a': (xs, ys)}, frame=Frame(log_x=log, log_y=log)), bars(dict(enumerate(ys)))):
            assert not re.search(r'\b(nan|inf)\b', p.html), (xs, ys)
            xml.dom.minidom.parseString(p.svg)


def test_arrays_and_tensors_are_welcome():
    np, torch = pytest.importorskip('numpy'), pytest.importorskip('torch')
    want = plot({'a': ([1, 2, 3], [1.0, 4.0, 9.0])})
    assert (
        plot({'a': (np.arange(1, 4), np.array([1.0, 4.0, 9.0]))})
        == want
        == plot({'a': (torch.arange(1, 4), torch.tensor([1.0, 4.0, 9.0]))})
    )
    assert Control(np.array([1, 2])).kind == 'slider' and Control(torch.tensor([1, 2]), value=2).value == 2
    assert bars({'a': torch.tensor(2.0)}) == bars({'a': np.float32(2)}) == bars({'a': 2.0})


@pytest.mark.parametrize(
    'x,says',
    [
        (0, '0'),
        (-7, '−7'),
        (1234567, '1,234,567'),
        (0.89166, '0.892'),
        (583.13, '583'),
        (1640.2, '1,640'),
        (1e-5, '1e-5'),
        (2.5e-7, '2.5e-7'),
        (float('nan'), 'nan'),
        (0.1, '0.1'),
        (99.96, '100'),
        (True, 'True'),
        ('q', 'q'),
        (1e20, '1e20'),
    ],
)
def test_tidy(x, says):
    assert tidy(x) == says


@pytest.mark.parametrize('lo,hi', [(0, 1), (-1, 1), (0.1, 0.11), (0, 1e-9), (1e6, 1.0001e6), (-3e9, 12), (7, 7)])
@pytest.mark.parametrize('log', [False, True])
def test_ticks_are_few_round_and_inside(lo, hi, log):
    if log and lo <= 0:
        lo = hi / 1e5
    axis = _Axis([lo, hi], log, None, 5)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 10 and len({t for _, t in ticks}) == len(ticks), ticks
    assert all(-1e-6 <= axis(v) <= 1 + 1e-6 for v, _ in ticks)


def test_table_formats_columns():
    t = table(
        [dict(name='a', acc=0.9, n=1640, seen=None), dict(name='b', acc=0.8917, n=3)],
        columns=dict(name='method', acc='accuracy', n='n'),
    )
    assert re.findall(r'<td[^>]*>([^<]*)</td>', t.html) == ['a', '0.900', '1,640', 'b', '0.892', '3']
    assert '<th scope=col class=n>accuracy</th>' in t.html


def test_import_is_light():
    import subprocess

    code = (
        "import sys, ftbook.show.charts, ftbook.show.bar_chart, ftbook.show.explorer, ftbook.show.tables, "
        "ftbook.show.intervals; print([m for m in ('torch', 'transformers', 'ipywidgets', 'matplotlib', 'numpy', "
        "'IPython', 'fastcore') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == '[]'
