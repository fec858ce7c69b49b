"Choosing: what a sweep says, and what it does not say. No model is trained here."

import json, math
from dataclasses import asdict

import numpy as np, pytest

from book import root
from ftbook.choose import method as choose_method
from ftbook.choose import settings as choose_settings
from ftbook.choose import surface as choose_surface
from ftbook.choose import sweep as choose_sweep
from ftbook.choose import ways as choose_ways
from ftbook.recipe.config import load_recipe
from ftbook.results import result_lines
from ftbook.show.page import Picture
from cases.choose import advised, config, known, made, rows

results = root / "nbs" / "bench" / "results"

# The file


def test_a_file_as_it_is_written(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq

    runs = [{k: r[k] for k in choose_sweep.COLUMNS} | dict(valid_accuracy=0.0) for r in made(n=3)]
    runs[1] |= dict(accuracy=None, forgetting=None, valid_accuracy=None)
    table = pa.Table.from_pylist(runs).replace_schema_metadata(
        dict(ftbook=json.dumps(dict(rows=dict(test=3, valid=1), planned=dict(design=dict(movie=5)))))
    )
    pq.write_table(table, tmp_path / "a.parquet")
    found = choose_sweep.load_sweep(tmp_path / "a.parquet")
    assert (
        found.missing() == [("design", "movie", 3), ("design", "movie", 4)]
        and len(found.diverged()) == 1
        and len(found.of()) == 2
    )
    assert found.runs[0]["accuracy"] == pytest.approx(0.75 * runs[0]["accuracy"]) and found.runs[0]["gib"] == 1.0
    assert "2 missing, 1 diverged" in repr(found)
    about = dict(rows=dict(test=3, valid=1), planned=dict(design=dict(movie=5)))
    lines = [{k: v for k, v in r.items() if v is not None} for r in reversed(runs)]
    (tmp_path / "a.jsonl").write_text("".join(result_lines(about | dict(runs=lines))))
    same = choose_sweep.load_sweep(tmp_path / "a.jsonl")
    assert same.runs == found.runs and same.about == found.about
    (tmp_path / "b.jsonl").write_text("".join(result_lines(dict(runs=[{"part": "design", "lr": 1e-3}]))))
    with pytest.raises(ValueError, match="b.jsonl lacks the columns task, seed"):
        choose_sweep.load_sweep(tmp_path / "b.jsonl")
    pq.write_table(table.drop_columns(["lr", "task"]), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="b.parquet lacks the columns task, lr"):
        choose_sweep.load_sweep(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="c.parquet is not Parquet"):
        choose_sweep.load_sweep(tmp_path / "c.parquet")
    with pytest.raises(FileNotFoundError, match="no sweep"):
        choose_sweep.load_sweep(tmp_path / "gone.parquet")


def test_what_ships_is_what_was_measured():
    ours, theirs = choose_sweep.load_sweep(), choose_sweep.load_sweep(results / "sweep.jsonl")
    assert [{k: r[k] for k in choose_sweep.COLUMNS} for r in ours.runs] == [
        {k: r[k] for k in choose_sweep.COLUMNS} for r in theirs.runs
    ]
    assert "curve" not in ours.runs[0] and "curve" in theirs.runs[0]
    assert (
        set(choose_ways.evidence()) == {"curves", "zero_shot", "methods", "merging"}
        and choose_ways.evidence()["merging"]["merged"] > choose_ways.evidence()["merging"]["base"]
    )


# The surface


def test_a_surface_finds_the_hill_and_says_how_sure_it_is(known):
    runs = known.of(task="movie")
    surface = choose_surface.Surface(runs)
    assert choose_surface.explained(surface) > 0.7
    found = choose_surface.slice_along(surface, "lr", config())
    assert 2e-4 < max(found, key=lambda o: o[1])[0] < 5e-3
    assert all(s >= 0 for *_, s in found)
    flat = [m for _, m, _ in choose_surface.slice_along(surface, "dropout", config())]
    assert max(flat) - min(flat) < 0.1


def test_left_out_is_what_a_fit_without_the_run_says(known):
    from sklearn.gaussian_process import GaussianProcessRegressor

    runs = known.of(task="movie")
    surface = choose_surface.Surface(runs)
    X, y = np.array([choose_surface.coordinates(r) for r in runs]), surface.y
    z = (y - y.mean()) / y.std()
    for i in (0, 7):
        gp = GaussianProcessRegressor(surface.model.kernel_, optimizer=None).fit(np.delete(X, i, 0), np.delete(z, i))
        assert choose_surface.left_out(surface)[i] == pytest.approx(
            float(gp.predict(X[i : i + 1])[0]) * y.std() + y.mean(), abs=1e-5
        )


def test_a_logarithm_stays_positive(known):
    surface = choose_surface.Surface(known.of(task="movie"), "cpu_seconds")
    mean, sd = surface.predict([config(epochs=e) for e in (1, 2, 4)])
    assert (mean > 0).all() and mean[0] < mean[1] < mean[2] and (sd >= 0).all()
    with pytest.raises(ValueError, match="8 runs or more, and there are 2"):
        choose_surface.Surface(known.of(task="movie")[:2])


def test_nearest(known):
    runs = known.of(task="movie")
    assert [d for d, _ in choose_surface.nearest(runs, runs[3])][0] == 0.0
    assert len(choose_surface.nearest(runs, config(), 5)) == 5 and sorted(
        d for d, _ in choose_surface.nearest(runs, config(), 5)
    ) == [d for d, _ in choose_surface.nearest(runs, config(), 5)]


def test_importance(known):
    pytest.importorskip("optuna")
    found = choose_surface.importance(known.of(task="movie"))
    assert (
        next(iter(found)) == "lr"
        and found["lr"] > 0.4
        and sum(found.values()) <= 1.001
        and set(found) <= set(choose_sweep.SETTINGS)
    )


# The choice


def test_settings_come_from_the_hill_and_else_are_the_defaults(known):
    settings, why = choose_settings.choose_settings(known)
    assert 1e-4 < settings["lr"] < 1e-2 and settings["target_modules"] != "attention"
    assert (settings["dropout"], settings["precision"]) == (0.0, "bfloat16")
    assert set(why) == set(choose_sweep.SETTINGS[1:]) and "cannot tell" in why["dropout"] and "would give" in why["lr"]
    assert choose_settings.choose_settings(known) == (settings, why), "the same evidence gives the same advice"
    assert (
        choose_settings.score([choose_surface.Surface(known.of(task=t)) for t in known.tasks], [settings], 0.0)[0] > 0.9
    )


def test_defaults_together_cost_no_more_than_is_allowed(known):
    good, lost = (
        [choose_surface.Surface(known.of(task=t), m) for t in known.tasks] for m in ("accuracy", "forgetting")
    )

    def value(config):
        return choose_settings.worth(good, lost, [config])[0]

    changed = 0
    for pick in choose_settings.candidates(known.of(), 32):
        plain, which = choose_settings.simplify(pick, value)
        changed += plain != pick
        assert value(plain) >= value(pick) - choose_settings.WITHIN - 1e-9 and all(
            plain[k] == choose_settings.DEFAULTS[k] for k in which
        )
    assert changed > 20


def test_a_nat_has_its_price():
    # forgetting grows with the rate alone
    flat = choose_sweep.Sweep([dict(r, accuracy=0.5 + 0.001 * (i % 3)) for i, r in enumerate(made())])
    assert choose_settings.choose_settings(flat)[0]["lr"] < 2e-4
    hill = choose_sweep.Sweep(made(3e-3))
    free, dear = (choose_settings.choose_settings(hill, price=p)[0]["lr"] for p in (0.0, 1.0))
    assert dear < free


@pytest.mark.parametrize(
    "lower, upper, rows, how",
    [
        ({"16": 0.5, "32": 0.6}, {"16": 0.6, "32": 0.7}, 16, "measured"),
        ({"10": 0.5, "1000": 0.5}, {"10": 0.4, "1000": 0.6}, 100, "measured"),
        ({"10": 0.5, "20": 0.5}, {"10": 0.3, "20": 0.4}, 40, "extrapolated"),
        ({"10": 0.5, "20": 0.5}, {"10": 0.4, "20": 0.3}, math.inf, "measured"),
    ],
)
def test_crossing(lower, upper, rows, how):
    assert choose_method.crossing(lower, upper) == (pytest.approx(rows), how)


def only(*ways):
    return lambda way: (way in ways, False, 20.0)


@pytest.mark.parametrize(
    "n, holds, given, choice",
    [
        (0, only(*choose_ways.WAYS), {}, "zero-shot"),
        (0, only(*choose_ways.WAYS), dict(finetunes=2), "merge"),
        (8, only(*choose_ways.WAYS), dict(known=False), "SetFit"),
        (8, only(*choose_ways.WAYS), dict(classify=False), "zero-shot"),
        (500, only(*choose_ways.WAYS), {}, "LoRA"),
        (500, only("QLoRA"), {}, "QLoRA"),
        (500, only("prompt tuning"), {}, "prompt tuning"),
        (500, only(), {}, "a smaller model"),
        (500, only(*choose_ways.WAYS), dict(keep=True), "prompt tuning"),
        (10**6, only(*choose_ways.WAYS), {}, "full"),
        (10**6, only("LoRA"), {}, "LoRA"),
        (500, only(*choose_ways.WAYS), dict(finetunes=9), "LoRA"),
    ],
)
def test_decisions(n, holds, given, choice):
    found = choose_method.decide(n, holds, **given)
    assert (
        found.choice == choice
        and found.borders
        and all(b.source in ("measured", "extrapolated", "planned", "cited", "asked") for b in found.borders)
    )
    assert choice in repr(found)


def test_more_rows_never_lead_back():
    order = ["zero-shot", "SetFit", "LoRA", "full"]
    for known in (True, False):
        places = [
            order.index(choose_method.decide(n, only(*choose_ways.WAYS), known=known).choice)
            for n in (0, 8, 32, 100, 400, 2000, 10**5, 10**6)
        ]
        assert places == sorted(places)
    with pytest.raises(ValueError, match="-1 rows"):
        choose_method.decide(-1, only())


def test_the_plan_is_asked_for_memory():
    assert choose_ways.fits("LoRA", "smollm2-135m", 8, 64, "cpu")[:2] == (True, False)
    assert not choose_ways.fits("full", "smollm2-135m", 0.5, 64, "cpu")[0]


# The recommendation


def test_every_value_has_a_reason_and_the_file_is_a_recipe(rows, known, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = advised(tmp_path / "rows.jsonl", known)
    assert found.decision.choice == "LoRA" and not found.broken
    for key, (value, why, source) in found.reasons.items():
        assert why and source in ("asked", "audit", "measured", "planned"), key
        part, _, name = key.rpartition(".")
        assert getattr(getattr(found.recipe, part), name) == value if part else found.recipe.seed == value
    (tmp_path / "deep").mkdir()
    saved = found.save(tmp_path / "deep" / "it.yaml")
    assert asdict(load_recipe(saved)) == asdict(found.recipe) | dict(
        data=asdict(found.recipe.data) | dict(source=str((tmp_path / "rows.jsonl").resolve()))
    )
    with pytest.raises(FileExistsError, match="it.yaml is there already"):
        found.save(saved)
    assert json.loads(json.dumps(found.facts()))["choice"] == "LoRA" and "measured" in found._repr_html_()
    assert found.settings() == found.config and found.settings()["lr"] == found.recipe.train.lr


@pytest.mark.parametrize(
    "n, given, says",
    [
        (6, dict(known=False), "ftbook fewshot"),
        (6, dict(finetunes=2), "ftbook merge"),
        (6, {}, "no training"),
        (120, dict(memory_gib=0.01), "smaller model"),
        (120, {}, "ftbook train it.yaml"),
    ],
)
def test_what_to_do_next(rows, known, n, given, says):
    found = advised(rows[:n], known, **given)
    assert (
        says in found.next("it.yaml") and "ftbook train it.yaml" in found.next("it.yaml") and "# next: " in found.yaml()
    )


def test_passes_and_held_out():
    assert [choose_settings.passes(n, 4)[0] for n in (8, 64, 100, 500, 10_001)] == [
        4.0,
        4.0,
        2.6,
        2.0,
        1.0,
    ] and choose_settings.passes(500, 1)[0] == 1.0
    assert all(
        0 < choose_settings.held_out(n)[0] < 1 and "points" in choose_settings.held_out(n)[1]
        for n in (4, 100, 300, 5000)
    )


@pytest.mark.parametrize(
    "given, key, value",
    [
        (dict(target_modules="mlp"), "target_modules", ["gate_proj", "up_proj", "down_proj"]),
        (dict(), "target_modules", "all-linear"),
        (dict(alpha_ratio=0.5), "alpha", 8.0),
    ],
)
def test_a_configuration_as_a_recipe(given, key, value):
    assert getattr(choose_surface.as_recipe(config(**given), source="movie").method, key) == value


@pytest.mark.parametrize(
    "method, given, key, value",
    [("houlsby", dict(rank=32, dropout=0.1), "bottleneck_size", 32), ("prompt", dict(rank=4), "num_virtual_tokens", 4)],
)
def test_other_methods_as_recipes(method, given, key, value):
    blank = (
        dict.fromkeys(choose_sweep.SETTINGS)
        | dict(method=method, lr=1e-3, batch_size=8, epochs=1, warmup=0.0, precision="float32")
        | given
    )
    made = choose_surface.as_recipe(blank, source="movie")
    assert getattr(made.method, key) == value and made.model.dtype == "float32" and made.train.precision is None


def test_a_button_says_on_a_page_what_it_does():
    widgets = pytest.importorskip("ipywidgets")

    class Explorer:
        value, widget = 3, widgets.HTML("sliders")

    button = choose_surface.TrainButton(Explorer(), lambda v: Picture(f"<p>{v + 1}</p>"))
    assert button.press()._repr_html_() == "<p>4</p>" and "Jupyter" in button._repr_mimebundle_()["text/html"]
    assert button.widget.children[0] is Explorer.widget, "the sliders that a kernel follows stand above the button"
