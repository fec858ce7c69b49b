"Errors and private helpers of ftbook.show.page."

from fastcore.test import test_eq as check_eq, test_fail as check_fail
from ftbook.show.page import Picture


def test_pictures_with_the_same_html_are_equal_and_save_as_html():
    hello = Picture('<b>hello</b>')
    check_eq(hello, Picture('<b>hello</b>'))
    check_fail(lambda: hello.save('hello.png'), contains='saves to .html')
