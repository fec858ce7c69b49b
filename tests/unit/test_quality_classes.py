"Errors and private helpers of ftbook.quality.classes."

from fastcore.test import test_eq as check_eq, test_fail as check_fail
from ftbook.quality.classes import class_codes


def test_classes_are_numbered_in_order_and_one_type_is_asked_for():
    check_eq(class_codes(['b', 'a', 'b'])[1].tolist(), [1, 0, 1])
    check_fail(lambda: class_codes(['a', 1]), contains='row 1 has the label 1 (int)')
