"Errors and private helpers of ftbook.models.shipped."

import pytest

from ftbook.models.shipped import _pip_error


@pytest.mark.parametrize(
    "pip_said, we_say",
    [
        ("python: No module named pip", "m ensurepip"),
        (f"ERROR: HASHES\n   Got        {'a' * 64}", f"expected sha256 {'0' * 64}, got {'a' * 64}"),
        ("WARNING: Retrying\nERROR: No matching distribution found for tiny==1.0", "try again with a network"),
    ],
)
def test_an_error_of_pip_gets_its_remedy(pip_said, we_say):
    assert we_say in str(_pip_error("tiny", "1.0", "0" * 64, pip_said))
