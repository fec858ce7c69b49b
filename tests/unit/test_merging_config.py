"Configurations that are refused, each with its reason."

import pytest

from ftbook.merging.config import read_config
from tiny import save_siblings


@pytest.fixture(scope="module")
def ties(tmp_path_factory):
    folder = save_siblings(tmp_path_factory.mktemp("models"))
    models = [
        dict(model=str(folder / n), parameters=dict(weight=w, density=0.4)) for n, w in (("red", 1.0), ("blue", 0.5))
    ]
    return dict(merge_method="ties", base_model=str(folder / "base"), models=models, dtype="float32")


def test_the_configuration_is_read(ties):
    assert read_config(ties)["merge_method"] == "ties"


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(densitty=1), "'densitty' is not supported"),
        (dict(merge_method="nuslerp"), "'nuslerp' is not supported"),
        (dict(base_model=None), "needs a base_model"),
        (dict(parameters=dict(wieght=1)), "'wieght' is not supported"),
        (dict(dtype="float8"), "dtype must be one of"),
    ],
)
def test_a_word_that_is_not_known_is_refused(ties, change, said):
    with pytest.raises(ValueError, match=said):
        read_config(ties | change)


def test_a_model_that_is_listed_twice_is_refused(ties):
    with pytest.raises(ValueError, match="is listed twice"):
        read_config(ties | dict(models=ties["models"] * 2))
