"Charts and explorers: what is refused, and a file that is whole or not there."

import math, re

import pytest

from ftbook.show.bar_chart import bars
from ftbook.show.charts import Frame, plot
from ftbook.show.explorer import explore
from ftbook.show.page import Picture, row
from ftbook.show.tables import table
from cases.explore import trained, two_kinds


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


def test_save_is_whole_or_not_at_all(tmp_path):
    p = plot({'a': ([1, 2], [1, 2])})
    assert p.save(tmp_path / 'a.svg').read_text(encoding='utf-8') == p.svg
    assert p.html in p.save(str(tmp_path / 'a.html')).read_text(encoding='utf-8')
    assert sorted(f.name for f in tmp_path.iterdir()) == ['a.html', 'a.svg']
    with pytest.raises(FileNotFoundError):
        p.save(tmp_path / 'no' / 'a.svg')
