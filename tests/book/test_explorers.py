"Explorers and charts in a browser: alive without a kernel, legible at any width and in any theme."

import itertools, json, re, shutil
from html import unescape

import pytest

from book import nbs
from ftbook.show.charts import Frame, plot
from ftbook.show.controls import Control
from ftbook.show.explorer import _unpack, explore
from ftbook.show.page import page, Picture
from ftbook.show.tables import table
from cases.explore import gallery, two_kinds

NOTEBOOK = nbs / 'inside/explorer.ipynb'
FLAGS = [
    '--no-sandbox',
    '--disable-gpu',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
]


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


def alive(tab):
    "Wait until every explorer has unpacked its frames and shown one."
    tab.wait_for_function("[...document.querySelectorAll('[data-ftbook-explorer]')].every(e => e.ftbook == 'alive')", timeout=5000)


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
    saved = [''.join(d.get('text/html', '')) for d in outputs]
    explorers = [html for html in saved if 'data-ftbook-explorer ' in html]
    assert len(explorers) >= 3, 'the chapter shows explorers'
    tab = show(''.join(explorers))
    alive(tab)
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
    alive(tab)
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
    alive(tab)
    tab.keyboard.press('ArrowRight')
    same(tab, 0, ex.frame((4,)).html)
    assert slider.get_attribute('aria-valuetext') == '4' == tab.locator('output').inner_text()
    tab.keyboard.press('End')
    same(tab, 0, ex.frame((9,)).html)
    tab.wait_for_function("document.querySelector('[role=status]').textContent.includes('9 at 1 to 27 at 3')")


def test_without_javascript_the_first_frame_stands(show):
    ex = two_kinds()
    tab = show(ex.html, java_script_enabled=False)
    assert tab.locator('.ftbook-figure svg').is_visible()
    assert tab.get_by_text('once the notebook is trusted or run').is_visible()
    assert not tab.locator('.ftbook-controls *').count()


def test_with_javascript_the_line_about_it_is_gone(show):
    tab = show(two_kinds().html)
    alive(tab)
    assert not tab.locator('.ftbook-still').count() and tab.locator('.ftbook-controls label').count() == 3


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


# ---- charts: legible at any width, in light and in dark

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
