"The main job, at the size that the front page speaks of."

import pytest

from ftbook.recipe import run as recipe_run


@pytest.mark.slow
def test_the_main_job(tmp_path):
    facts = recipe_run.quickstart(tmp_path / "run", progress=False).facts
    assert facts["n_eval"] >= 500 and facts["accuracy_before"] < 0.70 and facts["accuracy_after"] >= 0.87
