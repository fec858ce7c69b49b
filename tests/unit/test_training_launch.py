"Processes that fail, and what is said of them."

import pytest

from ftbook.training.launch import run_processes


def test_the_error_of_a_process_is_told():
    def fails():
        raise OSError("no such luck")

    with pytest.raises(RuntimeError, match="1 processes failed.*(?s:.*)no such luck"):
        run_processes(fails, n=1)
