"Drawings as images, and back."

import base64, re, xml.dom.minidom

import pytest

from ftbook.show.drawing import box, drawing
from ftbook.show.images import as_drawings, as_images, OnSite, PLATE
from ftbook.show.intervals import draw_intervals
from ftbook.show.page import page, Picture, row
from ftbook.show.schedule import draw_schedule
from ftbook.show.tables import table
from cases.explore import gallery


def pictures():
    return gallery() | dict(
        drawing=drawing(300, 90, 'a "b" <c>', box(5, 5, 50, 30, 'W'), titled=True),
        schedule=draw_schedule([['F1', 'B1', ''], ['', 'F1', 'B1']], 'two devices'),
        intervals=draw_intervals({'news': (0.03, 0.01, 0.05)}, marks={'none': 0.0}),
    )


@pytest.mark.parametrize('name', pictures())
def test_an_image_holds_the_drawing_to_the_byte(name):
    html = pictures()[name].html
    image = as_images(html)
    assert '<svg' not in image and as_drawings(image) == html and as_images(image) == image
    for text, packed in re.findall(r'<img alt="([^"]*)"[^>]* src="data:image/svg\+xml;base64,([^"]+)"', image):
        held = xml.dom.minidom.parseString(base64.b64decode(packed)).documentElement
        assert text and text in html and held.getElementsByTagName('style') and held.getElementsByTagName('rect')


def test_a_notebook_gets_images_and_everything_else_drawings():
    chart = gallery()['bars']
    for thing in (chart, row(chart, chart), table([dict(a=chart)])):
        assert '<svg' not in thing._repr_html_() and '<img' in thing._repr_html_()
        assert '<svg' in thing.html and '<img' not in thing.html
    assert '<img' not in page('A run', ('', chart)) and '<svg' in page('A run', ('', chart))


def test_other_images_and_texts_are_left_alone():
    other = '<p>an <img src="x.png"> and &lt;svg&gt;</p>'
    assert as_images(other) == other == as_drawings(other)
    assert Picture(other)._repr_html_() == other


def staged(cells, path):
    from fastcore.nbio import dict2nb
    from nbdev.process import NBProcessor

    plain = dict(metadata={}, id='a')
    for cell in cells:
        cell |= plain | (dict(execution_count=1) if cell['cell_type'] == 'code' else {})
    nb = dict2nb(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5))
    nb.path_ = path
    NBProcessor(nb=nb, procs=[OnSite], process=True)
    return nb.cells


def test_the_site_shows_drawings_again(tmp_path):
    chart = gallery()['bars']
    chart.save(tmp_path / 'chart.svg')
    (tmp_path / 'other.svg').write_text('<svg xmlns="http://www.w3.org/2000/svg"></svg>')
    links = '![c](chart.svg)\n![o](other.svg)\n![b](https://x.org/b.svg)\n![n](none.svg)\nand ![c](chart.svg)'
    output = dict(output_type='display_data', metadata={}, data={'text/html': chart._repr_html_()})
    code, text = staged(
        [dict(cell_type='code', source='1', outputs=[output]), dict(cell_type='markdown', source=links)],
        tmp_path / 'page.ipynb',
    )
    assert code.outputs[0]['data']['text/html'] == chart.html
    assert text.source.startswith('```{=html}\n<svg') and PLATE not in text.source
    assert text.source.endswith('\n```' + links.split(')', 1)[1])
