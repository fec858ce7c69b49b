"Errors and private helpers of ftbook.show.page."

from importlib.resources import files

import pytest
from fastcore.test import test_eq as check_eq, test_fail as check_fail
from jinja2 import UndefinedError

from ftbook.show.page import inline, page, Picture, Section, whole_page
from ftbook.show.templates import _templates, fill


def test_pictures_with_the_same_html_are_equal_and_save_as_html():
    hello = Picture('<b>hello</b>')
    check_eq(hello, Picture('<b>hello</b>'))
    check_fail(lambda: hello.save('hello.png'), contains='saves to .html')


def test_a_template_escapes_text_and_refuses_what_it_was_not_given():
    evil = '<script>alert(1)</script>'
    shown = page(evil, (evil, [evil, Picture('<b>kept</b>')]))
    assert '<script' not in shown and shown.count('&lt;script&gt;') == 4 and '<b>kept</b>' in shown
    with pytest.raises(UndefinedError, match='title'):
        fill('page.html', layout='base.html', sections={})
    with pytest.raises(UndefinedError, match='large'):
        inline('run.html', dict(result=Section('', {})), missing=[])


def test_every_template_can_be_read():
    names = [f.name for f in (files('ftbook') / 'assets' / 'templates').iterdir()]
    assert {'base.html', 'inline.html', 'parts.html', 'page.css'} <= set(names)
    for name in names:
        _templates().get_template(name)


def test_a_section_that_is_lost_says_why_and_asks_for_nothing():
    html = whole_page('run.html', 'A run', dict(training=Section('Training', None, 'a <b>reason</b>')), missing=[])
    assert 'could not be drawn. a &lt;b&gt;reason' in html and 'id="training"' in html
