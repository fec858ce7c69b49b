"Errors and private helpers of ftbook.show.figure."

from fastcore.test import test_eq as check_eq
from ftbook.show.axes import _Axis
from ftbook.show.figure import _marks


def test_names_of_marks_share_a_row_where_they_fit():
    x = _Axis([0, 10], log=False, limits=None, n=5)
    check_eq(_marks({'one': 1, 'nine': 9}, x, 100)[1], 15)
    check_eq(_marks({'a long name here': 4, 'another long name': 5}, x, 100)[1], 30)
