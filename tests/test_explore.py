"ftbook.show: charts that hold at any width and in any theme, and explorers that are alive on a page without a kernel."

import base64, itertools, json, math, re, shutil, sys, xml.dom.minidom, zlib
from html import unescape
from pathlib import Path
import pytest
from ftbook.show.axes import _Axis, tidy
from ftbook.show.bar_chart import bars
from ftbook.show.charts import Frame, plot
from ftbook.show.controls import Control
from ftbook.show.drawing import drawing, label, tile
from ftbook.show.explorer import _unpack, drop_widget_views, explore
from ftbook.show.page import page, Picture, row
from ftbook.show.stacks import stacked_bars
from ftbook.show.tables import table

NOTEBOOK = Path(__file__).parent.parent / 'nbs/inside/explorer.ipynb'
FLAGS = [
    '--no-sandbox',
    '--disable-gpu',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
]
VIEW = 'application/vnd.jupyter.widget-view+json'


@pytest.fixture(scope='module')
def browser():
    "Headless Chromium: the system's, or the one playwright brought. It is needed, so its absence is a failure."
    from playwright.sync_api import Error, sync_playwright

    found = next(filter(None, map(shutil.which, ['chromium', 'chromium-browser', 'google-chrome', 'chrome'])), None)
    with sync_playwright() as p:
        try:
            b = p.chromium.launch(executable_path=found, args=FLAGS)
        except Error as e:
            pytest.fail(f"these tests need Chromium: install it, or run 'playwright install chromium' ({e})")
        yield b
        b.close()


@pytest.fixture
def show(browser):
    "Open HTML in a fresh page; afterwards nothing may have been asked of a network or written to the console."
    opened = []

    def _show(body, width=900, scheme='light', **kwargs):
        context = browser.new_context(viewport=dict(width=width, height=800), color_scheme=scheme, **kwargs)
        tab = context.new_page()
        trouble = []
        tab.on('pageerror', lambda e: trouble.append(str(e)))
        tab.on('console', lambda m: trouble.append(m.text))
        tab.on('request', lambda r: None if r.url.startswith(('data:', 'about:')) else trouble.append(r.url))
        tab.set_content(body if body.startswith('<!doctype') else page('test', ('', Picture(body))))
        opened.append((context, trouble))
        return tab

    yield _show
    for context, trouble in opened:
        context.close()
        assert not trouble, trouble


def same(tab, n, html):
    "Wait until the figure of explorer `n` is `html`, as the browser itself would write it."
    tab.wait_for_function(
        """([n, html]) => {const t = document.createElement('div'); t.innerHTML = html;
        return document.querySelectorAll('.ftbook-figure')[n].innerHTML === t.innerHTML}""",
        arg=[n, html],
        timeout=5000,
    )


def figure(tab, n=0):
    return tab.locator('.ftbook-figure').nth(n).inner_html()


def move(tab, n, k, place):
    "Move control `k` of explorer `n` the way a reader would."
    control = tab.locator('[data-ftbook-explorer]').nth(n).locator('input,select').nth(k)
    kind = control.get_attribute('type') or 'select'
    if kind == 'select':
        control.select_option(index=place)
    elif kind == 'checkbox':
        control.set_checked(bool(place))
    else:
        control.evaluate("(e, v) => {e.value = v; e.dispatchEvent(new Event('input', {bubbles: true}))}", str(place))


def trained(rank, kind, bias):
    return {'trained': rank * {'square': 1152, 'wide': 2112}[kind] + 576 * bias, 'all': 331776}


def two_kinds():
    return explore(
        trained,
        lambda v: bars(v, x_range=(0, 4e5)),
        rank=[1, 4, 16, 64],
        kind=Control(['square', 'wide'], value='wide'),
        bias=False,
    )


def one_line():
    return explore(
        lambda k: ([1, 2, 3], [k, k * 2, k * 3]),
        lambda v: plot({'a "quoted" <name>': v}, frame=Frame(y_range=(0, 30))),
        k=Control(range(10), value=3, label='<slope> & "more"'),
    )


# ---- the page without a kernel


def test_every_combination_is_the_python_frame(show):
    ex = two_kinds()
    start = ex.picture.html
    tab = show(ex.html)
    same(tab, 0, start)
    seen = set()
    for key in itertools.product(*(range(len(c.options)) for c in ex.controls)):
        for k, place in enumerate(key):
            move(tab, 0, k, place)
        same(tab, 0, ex.frame(key).html)
        seen.add(figure(tab))
    assert len(seen) == 4 * 2 * 2


def test_explorers_of_the_notebook_are_alive(show):
    outputs = [
        o['data'] for c in json.loads(NOTEBOOK.read_text())['cells'] for o in c.get('outputs', []) if 'data' in o
    ]
    explorers = [''.join(d['text/html']) for d in outputs if VIEW in d and 'text/html' in d]
    assert len(explorers) >= 3, 'the chapter shows explorers, each with both halves'
    tab = show(''.join(explorers))
    for n, html in enumerate(explorers):
        frames = _unpack(re.search(r'data-frames="([^"]+)"', html)[1])
        options = json.loads(unescape(re.search(r'data-options="([^"]+)"', html)[1]))
        for k, choice in enumerate(options):
            others, seen = [figure(tab, m) for m in range(len(explorers)) if m != n], set()
            for place in range(len(choice)):
                move(tab, n, k, place)
                box = tab.locator('[data-ftbook-explorer]').nth(n)
                places = box.locator('input,select').evaluate_all(
                    "es => es.map(e => e.type == 'checkbox' ? +e.checked : +e.value)"
                )
                at = 0
                for p, o in zip(places, options):
                    at = at * len(o) + p
                same(tab, n, frames['frames'][frames['index'][at]])
                seen.add(figure(tab, n))
            assert len(seen) == len(choice), f'control {k} of explorer {n} does not change the figure'
            assert others == [figure(tab, m) for m in range(len(explorers)) if m != n], (
                'moving one explorer moved another'
            )


def test_two_on_a_page_do_not_clash(show):
    a, b = two_kinds(), one_line()
    tab = show(a.html + b.html + a.html)
    first, second, third = (figure(tab, n) for n in range(3))
    assert first == third
    move(tab, 1, 0, 9)
    same(tab, 1, b.frame((9,)).html)
    move(tab, 2, 0, 3)
    same(tab, 2, a.frame((3, 1, 0)).html)
    assert figure(tab, 0) == first and figure(tab, 1) != second and figure(tab, 2) != third
    assert tab.evaluate("[...document.querySelectorAll('[id]')].length") == 0


def test_keyboard_and_screen_reader(show):
    ex = one_line()
    tab = show(ex.html)
    slider = tab.get_by_role('slider', name='<slope> & "more"')
    slider.focus()
    assert slider.get_attribute('aria-valuetext') == '3'
    tab.keyboard.press('ArrowRight')
    same(tab, 0, ex.frame((4,)).html)
    assert slider.get_attribute('aria-valuetext') == '4' == tab.locator('output').inner_text()
    tab.keyboard.press('End')
    same(tab, 0, ex.frame((9,)).html)
    tab.wait_for_function("document.querySelector('[role=status]').textContent.includes('9 at 1 to 27 at 3')")


def test_without_javascript_the_first_frame_stands(show):
    ex = two_kinds()
    tab = show(ex.html, java_script_enabled=False)
    assert tab.locator('.ftbook-figure svg').is_visible() and tab.locator('noscript').is_visible()


def test_a_browser_that_cannot_unpack_says_so(show):
    ex = one_line()
    tab = show('<script>delete window.DecompressionStream</script>' + ex.html)
    tab.get_by_text('could not unpack').wait_for(timeout=5000)
    move(tab, 0, 0, 5)
    same(tab, 0, ex.picture.html)


def test_a_move_is_answered_at_once(show):
    ex = two_kinds()
    tab = show(ex.html)
    move(tab, 0, 0, 3)
    same(tab, 0, ex.frame((3, 1, 0)).html)
    now = tab.evaluate("""() => {const e = document.querySelector('select'), f = document.querySelector('[data-ftbook-figure]'), before = f.innerHTML;
        e.value = 0; e.dispatchEvent(new Event('input', {bubbles: true})); return f.innerHTML !== before}""")
    assert now


def test_quick_moves_end_at_the_last(show):
    ex = one_line()
    tab = show(ex.html)
    tab.evaluate("""() => {const e = document.querySelector('input');
        for (const v of [9, 1, 8, 2, 7]) {e.value = v; e.dispatchEvent(new Event('input', {bubbles: true}))}}""")
    same(tab, 0, ex.frame((7,)).html)


# ---- one output, two halves


def test_one_bundle_carries_both():
    ex = two_kinds()
    bundle = ex._repr_mimebundle_()
    assert set(bundle) == {'text/plain', 'text/html', VIEW}
    assert bundle[VIEW]['model_id'] == ex.widget.model_id and 'DecompressionStream' in bundle['text/html']
    json.dumps(bundle)


def test_widget_and_controls_follow_each_other():
    ex = two_kinds()
    ex._repr_mimebundle_()
    slider, menu, check, shown = ex.widget.children
    slider.value, menu.value, check.value = 3, 0, True
    assert (ex.controls.rank.value, ex.controls.kind.value, ex.controls.bias.value) == (64, 'square', True)
    assert shown.value == ex.frame((3, 0, 1)).html
    ex.controls.rank.value, ex.controls.bias.value = 1, False
    assert (slider.value, check.value, shown.value) == (0, False, ex.frame((0, 0, 0)).html)
    assert ex.value == trained(1, 'square', False)


def test_the_same_cell_saves_the_same_output():
    a, b = two_kinds(), two_kinds()
    assert a.html == b.html
    A, B = a._repr_mimebundle_(), b._repr_mimebundle_()
    assert A[VIEW]['model_id'] != B[VIEW]['model_id'], 'two views in one kernel need two names'
    assert re.fullmatch(r'ftbook[0-9a-f]{8}-\d+', A[VIEW]['model_id'])


def test_without_ipywidgets_the_page_half_remains(monkeypatch):
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


def test_staging_drops_the_widget_only_beside_html():
    from nbdev.process import NBProcessor
    from fastcore.nbio import dict2nb

    def cell(data):
        return dict(
            cell_type='code',
            source='1',
            metadata={},
            execution_count=1,
            id='a',
            outputs=[dict(output_type='display_data', metadata={}, data=data)],
        )

    nb = dict2nb(
        dict(cells=[cell({VIEW: {}, 'text/html': 'x'}), cell({VIEW: {}})], metadata={}, nbformat=4, nbformat_minor=5)
    )
    NBProcessor(nb=nb, procs=[drop_widget_views], process=True)
    assert [list(c.outputs[0]['data']) for c in nb.cells] == [['text/html'], [VIEW]]


# ---- bad input says what and where


def nothing(**kwargs):
    return 0


@pytest.mark.parametrize(
    'make,error,says',
    [
        (lambda: two_kinds().controls.rnk, AttributeError, "no control 'rnk'; there are: rank, kind, bias"),
        (lambda: setattr(two_kinds().controls, 'rank', 4), AttributeError, 'controls.rank.value = 4'),
        (
            lambda: setattr(two_kinds().controls.rank, 'value', 5),
            ValueError,
            'rank cannot be 5; its options are 1, 4, 16, 64',
        ),
        (
            lambda: setattr(two_kinds().controls.bias, 'value', 1),
            ValueError,
            'bias cannot be 1; its options are False, True',
        ),
        (lambda: explore(trained, bars, rnk=[1]), TypeError, 'compute cannot be called with the controls rnk'),
        (lambda: explore(trained, bars), ValueError, 'at least one control'),
        (lambda: explore(nothing, bars, a=[]), ValueError, 'at least one option'),
        (lambda: explore(nothing, bars, a=[1, 1]), ValueError, 'options repeat'),
        (
            lambda: explore(nothing, bars, a=range(50), b=range(90)),
            ValueError,
            "a (50) x b (90) = 4,500 frames, more than 2,000; thin 'b', which has 90 options",
        ),
        (
            lambda: explore(nothing, lambda v: '<b>', a=[1]).html,
            TypeError,
            "draw should return a Picture, not str (at {'a': 1})",
        ),
        (
            lambda: explore(nothing, lambda v: Picture('x' * 99), a=[1], max_bytes=9).html,
            ValueError,
            "more than 9; draw less in each, or thin 'a'",
        ),
        (lambda: plot(), ValueError, 'nothing to plot'),
        (lambda: plot([1, 2]), ValueError, 'lines should be a dict from names to series, not list'),
        (lambda: plot({'a': [1, 2, 3]}), ValueError, "line 'a' should be a tuple (xs, ys)"),
        (lambda: plot({'a': ([], [])}), ValueError, "line 'a' is empty"),
        (lambda: plot({'a': ([1], [1, 2])}), ValueError, "line 'a': 1 xs but 2 ys"),
        (lambda: plot(bands={'a': ([1], [1], [1, 2])}), ValueError, "band 'a': 1 xs but 1 lows but 2 highs"),
        (lambda: plot({'a': ([1, 2], [math.nan, None])}), ValueError, "line 'a': none of its 2 values is finite"),
        (lambda: plot({'a': ([1], ['x'])}), ValueError, "line 'a' has 'x', which is not a number"),
        (
            lambda: plot(points={'a': ([0], [1])}, frame=Frame(log_x=True)),
            ValueError,
            "log_x needs values above 0; points 'a' has 0",
        ),
        (
            lambda: plot({'a': ([1], [-1])}, frame=Frame(log_y=True)),
            ValueError,
            "log_y needs values above 0; line 'a' has -1",
        ),
        (lambda: plot({'a': ([1], [1])}, frame=Frame(y_range=(2, 1))), ValueError, 'an axis cannot go from 2 to 1'),
        (
            lambda: plot({'a': ([1], [1])}, marks={'m': 0}, frame=Frame(log_x=True)),
            ValueError,
            "log_x needs values above 0; mark 'm' has 0",
        ),
        (lambda: bars({}), ValueError, 'nothing to draw'),
        (lambda: bars({'a': 'x'}), ValueError, "bar 'a' has 'x', which is not a number"),
        (lambda: bars({'a': 1}, errors={'b': 1}), ValueError, "errors names 'b', which is no bar; there are: a"),
        (lambda: table([]), ValueError, 'no rows'),
        (lambda: row(), ValueError, 'at least one picture'),
        (lambda: Picture('x').save('x.png'), ValueError, 'saves to .html'),
    ],
)
def test_errors(make, error, says):
    with pytest.raises(error, match=re.escape(says)):
        make()


# ---- charts: legible at any width, in light and in dark

LONG = 'transformers Trainer with peft, padded batches'


def gallery():
    ranks, xs = [2**k for k in range(10)], list(range(1, 400))
    return dict(
        logs=plot(
            {
                n: (ranks, [r * c for r in ranks])
                for n, c in (('576×192', 3e-3), ('576×576', 2e-3), ('576×1,536', 1.9e-3))
            },
            x_label='rank',
            y_label='share',
            title='A title',
            marks={'rank 16': 16, 'breaks even at': 288, 'and here is another': 300},
            frame=Frame(log_x=True, log_y=True),
        ),
        band=plot(
            {'mean': (xs, [1 / x for x in xs])},
            {'each': (xs, [1.1 / x for x in xs])},
            {'mean': (xs, [0.8 / x for x in xs], [1.2 / x for x in xs])},
            x_label='step',
        ),
        many=plot(
            {f'method number {i}': ([0, 1], [i, i * 2]) for i in range(9)},
            title='A long title that has to wrap on a narrow page, and does',
        ),
        near=plot({c: ([0, 1], [0, 1 + i / 1e3]) for i, c in enumerate('abcdef')}, frame=Frame(height=240)),
        lrs=plot({'accuracy': ([1e-5, 1e-4, 1e-3], [0.6, 0.7, 0.9])}, frame=Frame(log_x=True, height=240)),
        big=plot({'': ([0, 4e9], [-5e6, 5e6])}),
        flat=plot({'': ([1, 2], [3, 3])}),
        small=plot({'': ([0, 3e-5], [0, 2e-7])}),
        bars=bars(
            {'before': 0.628, 'after': 0.892},
            errors={'before': 0.04, 'after': (0.86, 0.917)},
            marks={'majority class': 0.53},
        ),
        groups=bars(
            {'q, o': {'all': 663552, 'LoRA': 36864}, 'gate, up, down': {'all': 2654208, 'LoRA': 101376}}, title='Groups'
        ),
        long=bars({LONG: 224, 'ftbook': 421.4, 'broken': math.nan}),
        signs=bars({'forgotten': -3.2, 'gained': 12.5, 'equal': 0}, errors={'forgotten': 0.8}),
        stacks=stacked_bars(
            {'LLaMA-7B, LoRA': {'weights': 12.6, 'activations': 3.1}, LONG: {'weights': 2.5, 'AdamW': 10.1}},
            unit='GiB',
            title='Peak of a step',
            marks={'8 GiB': 8, '16 GiB': 16, '80 GiB': 80},
        ),
    )


OVERLAPS = """() => {const bad = [];
  for (const svg of document.querySelectorAll('svg[role=img]')) {
    const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
    const outer = svg.parentNode.getBoundingClientRect();
    for (const [t, r] of texts) if (r.left < outer.left - 1 || r.right > outer.right + 1) bad.push([t, 'sticks out']);
    texts.forEach(([t, r], i) => texts.slice(i + 1).forEach(([u, s]) => {
      if (r.left < s.right - 1 && s.left < r.right - 1 && r.top < s.bottom - 3 && s.top < r.bottom - 3) bad.push([t, u])}))}
  return bad}"""


@pytest.mark.parametrize('width', [900, 400, 340])
def test_no_text_collides_or_sticks_out(show, width):
    tab = show(page('gallery', *gallery().items()), width=width)
    assert tab.evaluate(OVERLAPS) == []
    assert tab.evaluate('document.documentElement.scrollWidth') <= width


CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const rgb = c => {canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3)};
  const light = c => {const [r, g, b] = rgb(c).map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b};
  const paper = light(getComputedStyle(document.body).backgroundColor), out = [];
  for (const e of document.querySelectorAll('[style*="color-mix"]')) {
    const l = light(getComputedStyle(e).color);
    out.push([e.tagName, (Math.max(l, paper) + .05) / (Math.min(l, paper) + .05)])}
  return out}"""


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_contrast(show, scheme):
    tab = show(page('gallery', *gallery().items()), scheme=scheme)
    found = tab.evaluate(CONTRAST)
    assert len(found) > 30
    assert min(c for tag, c in found if tag == 'text') >= 4.5, 'names at the ends of lines are text'
    assert min(c for tag, c in found) >= 3, 'curves and bars are graphics'


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


def test_save_is_whole_or_not_at_all(tmp_path):
    p = plot({'a': ([1, 2], [1, 2])})
    assert p.save(tmp_path / 'a.svg').read_text(encoding='utf-8') == p.svg
    assert p.html in p.save(str(tmp_path / 'a.html')).read_text(encoding='utf-8')
    assert sorted(f.name for f in tmp_path.iterdir()) == ['a.html', 'a.svg']
    with pytest.raises(FileNotFoundError):
        p.save(tmp_path / 'no' / 'a.svg')


def test_a_page_stands_alone(show):
    report = page(
        'A run',
        ('Loss', plot({'a': ([1, 2], [1, 2])})),
        ('Loss', [table([dict(a=1, b=None)]), 'more']),
        ('Next', 'x'),
    )
    tab = show(report)
    assert tab.locator('h2').evaluate_all('es => es.map(e => e.id)') == ['loss', 'loss-2', 'next']
    assert tab.locator('nav a').count() == 3
    assert not re.search(r'(src|href)="(?!#|data:)', report)


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
