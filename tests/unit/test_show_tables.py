"Errors and private helpers of ftbook.show.tables."

from fastcore.test import test_eq as check_eq, test_fail as check_fail
from ftbook.show.tables import _column, table


def test_columns_are_rounded_alike_and_missing_ones_are_named():
    check_eq(_column([1.0, 0.25, None], 3), ['1.00', '0.25', 'None'])
    check_fail(lambda: table([]), contains='no rows')
    check_fail(lambda: table([{'a': 1}], columns=['b']), contains="no row has 'b'; there are: a")
