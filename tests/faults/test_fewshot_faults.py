"Few labels: texts, labels, settings and files that cannot be used, and a fit that is interrupted."

import json, os, pickle, re, warnings

import pytest

from ftbook.fewshot import contrast as fewshot_contrast
from ftbook.fewshot.classifier import FewShotClassifier
from ftbook.fewshot.rows import make_shots
from ftbook.fewshot.tuning import Tuning
from ftbook.fewshot.report import fewshot_report, FewShotSettings
from ftbook.fewshot.exchange import load_classifier, load_setfit
from ftbook.methods.lora_method import LoRA
from ftbook.problem import Place, Problem
from cases.fewshot import classifier, fitted, sentences, tiny, write_csv


# The classifier


def test_labels_that_are_numbers(tiny, tmp_path):
    texts, labels = sentences(4)
    model = classifier(tiny, tuning=None).fit(texts, [len(c) for c in labels])
    assert set(model.predict(texts)) <= {3, 6, 7}
    model.save(tmp_path / "m")
    assert load_classifier(tmp_path / "m", "cpu").classes == [3, 6, 7]


# Rows that are not as they should be


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "row 1: the text is empty"),
        ("  \n", "row 1: the text is empty"),
        (None, "row 1: the text is NoneType"),
        (3.5, "row 1: the text is float"),
        (float("nan"), "row 1: the text is float"),
    ],
)
def test_what_is_no_text(tiny, text, said):
    with pytest.raises(ValueError, match=said):
        classifier(tiny).fit(["a", text], ["x", "y"])


def test_one_text_with_two_labels():
    with pytest.warns(UserWarning, match="2 rows are left out, since their text has two labels; the first is row 0"):
        shots = make_shots(["a", "b", "A ", "c"], ["x", "y", "y", "x"])
    assert shots.texts == ["b", "c"]
    with (
        pytest.raises(
            ValueError, match="no row is left; 2 rows were left out, since their text has two labels, the first 'a'"
        ),
        pytest.warns(UserWarning),
    ):
        make_shots(["a", "a"], ["x", "y"])


def test_labels_that_differ_by_case_or_blanks():
    texts = list("abcd")
    with pytest.raises(ValueError, match="'Spam' and 'spam '|'spam ' and 'Spam'"):
        make_shots(texts, ["spam ", "ham", "Spam", "ham"])
    assert make_shots(texts, ["spam ", "ham", "Spam", "ham"], same_labels="merge").targets.sum(0).tolist() == [2, 2]
    with pytest.warns(UserWarning):
        assert len(make_shots(texts, ["spam ", "ham", "Spam", "ham"], same_labels="keep").classes) == 3
    with pytest.raises(ValueError, match="differ by case"):
        make_shots(texts, [["a", "b"], ["A"], ["b"], ["b"]])
    with pytest.raises(ValueError, match="same_labels must be 'refuse', 'merge' or 'keep', not 'join'"):
        make_shots(texts, ["spam", "ham", "spam", "ham"], same_labels="join")


def test_the_error_about_labels_names_the_commands_flag_too():
    from typer.testing import CliRunner
    from ftbook.cli import app

    with pytest.raises(ValueError, match="same_labels='merge'") as refused:
        make_shots(list("ab"), ["spam", "Spam"])
    (flag,) = re.findall(r"--[\w-]+", str(refused.value))
    help_text = (
        CliRunner().invoke(app, ["fewshot", "--help"], env=dict(COLUMNS="200", NO_COLOR="1", TERM="dumb")).stdout
    )
    assert flag in help_text


@pytest.mark.parametrize(
    "labels, said",
    [
        (["x", None], "row 1 has the label None"),
        (["x", 3], "row 1 has the label 3"),
        (["x", ""], "row 1 has the label ''"),
        (["x"], "2 texts but 1 labels"),
        (["x", 1.5], "row 1"),
    ],
)
def test_labels_that_cannot_be_used(labels, said):
    with pytest.raises(ValueError, match=said):
        make_shots(["a", "b"], labels)


@pytest.mark.parametrize(
    "kw, said",
    [
        (dict(head="forest"), "logistic, ridge, mean"),
        (dict(encoder="/no/such/encoder"), "cannot load"),
        (dict(tuning="whole"), "'auto', None or a Tuning"),
    ],
)
def test_what_cannot_be_built(tiny, kw, said):
    with pytest.raises(ValueError, match=said):
        FewShotClassifier(kw.pop("encoder", tiny), device="cpu", **kw)


@pytest.mark.parametrize("check", [1, 99, -2])
def test_parts_that_make_no_sense(tiny, check):
    with pytest.raises(ValueError, match="number of parts from 2 to 24"):
        classifier(tiny).fit(*sentences(8), check=check)


@pytest.mark.parametrize(
    "kw, said",
    [
        (dict(loss="triplet"), "loss must be 'similarity' or 'contrastive', not 'triplet'"),
        (dict(steps=0), "steps must be 1 or more, not 0"),
        (dict(least=0), "least must be 1 or more, not 0"),
        (dict(least=None), "least must be 1 or more, not None"),
        (dict(batch_size=1), "batch_size must be 2 or more, not 1"),
        (dict(batch_size=None), "batch_size must be 2 or more, not None"),
        (dict(lr=0), "lr must be above 0, not 0"),
        (dict(temperature=-1), "temperature must be above 0, not -1"),
        (dict(lora=LoRA(dropout=0.1)), r"lora has dropout=0\.1, but the encoder is tuned without any"),
    ],
)
def test_tuning_that_makes_no_sense(kw, said):
    with pytest.raises(ValueError, match=said):
        Tuning(**kw)


def test_an_interrupted_fit_leaves_nothing_half_learnt(tiny, monkeypatch):
    texts, labels = sentences(8)
    model = classifier(tiny, tuning=Tuning(steps=4, lr=2e-3))
    first, (real, calls) = model.fit(texts, labels).losses, (fewshot_contrast.batch_loss, [])

    def stopped(*args):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(*args)

    # in both folds of the check, and in the tuning
    for at in (2, 7, 11):
        calls.clear()
        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(fewshot_contrast, "batch_loss", stopped)
            model.fit(texts, labels)
        with pytest.raises(ValueError, match="not fitted"):
            model.predict(["the ship"])
        assert model.fit(texts, labels).losses == first


# Files


def test_a_folder_of_another_version(fitted, tmp_path):
    folder = fitted.save(tmp_path / "m")
    facts = json.loads((folder / "fewshot.json").read_text())
    (folder / "fewshot.json").write_text(json.dumps(facts | dict(format=2)))
    with pytest.raises(ValueError, match="format 2, this version reads 1"):
        load_classifier(folder)
    (folder / "fewshot.json").write_text(json.dumps(facts | dict(classes=["a", "b"])))
    with pytest.raises(ValueError, match="3 classes, fewshot.json 2"):
        load_classifier(folder)
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_classifier(tmp_path / "nowhere")


class Trap:
    def __reduce__(self):
        return os.system, ("touch trapped",)


def test_a_pickle_is_never_opened(fitted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = fitted.save(tmp_path / "m")
    (folder / "head.safetensors").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="is not opened"):
        load_classifier(folder)
    (folder / "model_head.pkl").write_bytes(pickle.dumps(Trap()))
    (folder / "fewshot.json").unlink()
    with pytest.raises(ValueError, match="can run code"):
        load_classifier(folder)
    with pytest.raises(ValueError, match="can run code"):
        load_setfit(folder)
    assert not (tmp_path / "trapped").exists()
    # whoever says so has it opened
    with pytest.raises(ValueError, match="linear"):
        load_setfit(folder, trust_pickle=True)
    assert (tmp_path / "trapped").exists()


def test_an_unfitted_one_is_not_saved(tiny, tmp_path):
    with pytest.raises(ValueError, match="not fitted"):
        classifier(tiny).save(tmp_path / "m")
    with pytest.raises(ValueError, match="no model_head"):
        load_setfit(tmp_path, trust_pickle=True)


# From a file


@pytest.mark.parametrize(
    "rows, kw, said",
    [
        ([("text", "label"), ("1.5", "a"), ("2", "b")], {}, "no text but numbers"),
        ([("text", "label"), ("a", "x"), ("b", "y")], dict(text_column="body"), "there are 'text', 'label'"),
        ([("text",), ("a",), ("b",)], {}, "a label is needed"),
        ([("text", "label"), ("a", ""), ("b", "")], {}, r"rows.csv: no row has a label in the column 'label'"),
        ([("text", "label"), ("a", "x"), ("b", "x")], {}, "needs two or more"),
        ([("text", "label"), ("a", "x"), ("b", "X")], {}, "differ by case"),
        (
            [("text", "label"), ("a", "x"), ("", "y")],
            {},
            r"rows\.csv, row 1: the text is empty, and the label is 'y'",
        ),
        ([("text", "label"), ("a", "x"), ("b", "y")], dict(shots=0), "shots must be 1 or more"),
        ([("text", "label"), ("a", "x"), ("b", "y")], {}, "no row can be held out"),
    ],
)
def test_a_file_that_cannot_be_used(tiny, tmp_path, rows, kw, said):
    with pytest.raises(ValueError, match=said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fewshot_report(
            write_csv(tmp_path / "rows.csv", rows),
            out=tmp_path / "out",
            settings=FewShotSettings(tiny, device="cpu"),
            **kw,
        )


def test_a_row_of_a_file_keeps_its_number_whatever_is_left_out_before_it(tiny, tmp_path):
    "Rows without a label are not learnt from, and `shots` takes some of the others: the number stays the file's."
    texts, labels = sentences(4, classes=("kitchen", "sea"))
    rows = [dict(text="no label", label=None), *(dict(text=t, label=c) for t, c in zip(texts, labels))]
    file = tmp_path / "rows.jsonl"

    def write(rows):
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))

    write([*rows, dict(text=" ", label="land")])
    with pytest.raises(Problem, match=r"rows\.jsonl, row 9: the text is empty, and the label is 'land'") as found:
        fewshot_report(file, out=tmp_path / "out", settings=FewShotSettings(tiny, device="cpu"), shots=2)
    assert found.value.where == Place(file, 9, "text") and "leave the row out" in found.value.remedy
    for odd in (dict(text=3.5, label="sea"), dict(text=3.5, label=None)):
        write([*rows, odd])
        with pytest.raises(ValueError, match=r"rows\.jsonl, row 9: the text is 3\.5, not a string"):
            fewshot_report(file, out=tmp_path / "out", settings=FewShotSettings(tiny, device="cpu"))
    write([dict(text="", label="sea"), *rows])
    test = write_csv(tmp_path / "test.csv", [("text", "label"), ("", "sea"), ("the oven", "kitchen")])
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 0: "):
        fewshot_report(file, out=tmp_path / "out", settings=FewShotSettings(tiny, device="cpu"), test=test)
    write(rows)
    judged = fewshot_report(file, out=tmp_path / "out", settings=FewShotSettings(tiny, device="cpu"), test=test)
    assert judged.facts["n_judged"] == 2, "a test row without a text is judged like any other"


def test_a_warning_counts_the_rows_of_the_file(tiny, tmp_path):
    "Two rows without a label stand before the row whose text has two labels."
    texts, labels = sentences(4, classes=("kitchen", "sea"))
    rows = [("no label", ""), ("none either", ""), ("both", "kitchen"), ("both", "sea"), *zip(texts, labels)]
    file = write_csv(tmp_path / "rows.csv", [("text", "label"), *rows])
    report = fewshot_report(file, out=tmp_path / "out", settings=FewShotSettings(tiny, device="cpu"))
    assert any("2 rows are left out" in w and "the first is row 2: 'both'" in w for w in report.facts["warnings"])


def test_a_stream_counts_its_rows_across_portions(tiny):
    model = classifier(tiny, tuning=None).fit(*sentences(2))
    with pytest.raises(Problem) as found:
        list(model.stream(["a", "b", "c", 4.0], portion=2))
    assert found.value.where.row == 3
