"Choosing: what becomes of bad input."

import pytest

from ftbook.choose import recommend as choose_recommend
from ftbook.choose import settings as choose_settings
from ftbook.choose import surface as choose_surface
from ftbook.choose import sweep as choose_sweep
from cases.choose import advised, known, made, rows


# The surface


def test_importance_without_optuna(known, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match="pip install optuna"):
        choose_surface.importance(known.of(task="movie"))


# The choice


@pytest.mark.parametrize("price", [-0.1, float("nan"), float("inf")])
def test_a_price_is_a_number_of_at_least_nothing(price):
    with pytest.raises(ValueError, match="price must be a number of at least 0"):
        choose_settings.choose_settings(choose_sweep.Sweep(made()), price=price)


# The recommendation


def test_broken_rows_are_told_first(rows, known):
    found = advised([r for r in rows if r["label"] == "good"], known)
    assert found.yaml().split("\n")[1].startswith("# The audit calls these rows broken.")
    shown = found._repr_html_().split("<section>")[1]
    assert shown.strip().startswith("<p><b>The audit calls these rows broken.</b>")
    assert "labels.classes" in found.facts()["broken"][0]


@pytest.mark.parametrize(
    "given, said", [(dict(memory_gib=-1), "GiB"), (dict(memory_gib=0), "GiB"), (dict(text_column="nothing"), "nothing")]
)
def test_bad_input(rows, known, given, said):
    with pytest.raises(ValueError, match=said):
        advised(rows, known, **given)


def test_rows_that_cannot_be_used(known):
    with pytest.raises(ValueError, match="none of its 2 rows can be used"):
        advised([dict(text="", label="a")] * 2, known)
