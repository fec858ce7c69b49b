"What the recipe promises: bad input is named, the choice is exact, and a run can be stopped anywhere and gone on with."

import errno, html, inspect, json, os, re, shutil, signal, subprocess, sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest, torch, yaml
from hypothesis import given, settings, strategies as st

from ftbook.forgetting import lost as forgetting_lost
from ftbook.forgetting import choices as forgetting_choices
from ftbook.recipe import checks as recipe_checks
from ftbook.recipe import config as recipe_config
from ftbook.recipe import facts as recipe_facts
from ftbook.recipe import job as recipe_job
from ftbook.recipe import judge as recipe_judge
from ftbook.recipe import machine as recipe_machine
from ftbook.recipe import preflight as recipe_preflight
from ftbook.recipe import report as recipe_report
from ftbook.recipe import rows as recipe_rows
from ftbook.recipe import run as recipe_run
from ftbook.recipe import stages as recipe_stages
from ftbook.recipe import words as recipe_words
from ftbook.training import tune as training_tune
from ftbook.methods.lora_method import LoRA
from ftbook.methods.files import load_adapter
from ftbook.methods.fold import remove_
from ftbook.models.load import load_model
from ftbook.models.shipped import model_folder
from ftbook.problem import Problem
from ftbook.training.settings import Settings
from ftbook.training.tune import finetune
from tiny import good_rows, save_tiny_model, tiny_config, write_config, write_rows


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make(tiny, tmp_path):
    "A recipe for the tiny model and a file of good rows; sections given are merged into it."
    source = write_rows(tmp_path / "rows.jsonl", good_rows())
    return lambda **sections: recipe_config.make_recipe(tiny_config(tiny, source, **sections))


# The configuration


def test_finetune_takes_every_setting_by_name():
    known = inspect.signature(finetune).parameters
    own = ["model", "examples", "eval_examples", "settings", "out", "resume", "callbacks", "progress"]
    assert list(known)[:8] == own and list(known)[-1] == "changes"
    assert list(known)[8:-1] == [f.name for f in fields(Settings)]
    assert all(known[f.name].default == f.default for f in fields(Settings))


def test_the_keys_of_train_are_the_settings():
    keys = {k["key"].removeprefix("train.") for k in recipe_config.list_keys() if k["key"].startswith("train.")}
    assert keys == {f.name for f in fields(Settings)} - {"regularizer"}


def test_method_keys_are_the_arguments_of_the_methods():
    only_in_python = {
        "seed",
        "tokenizer",
        "layers_pattern",
        "activation",
        "scaling",
        "init_std",
        "layout",
        "feedforward_modules",
        "projection",
        "encoder_hidden_size",
        "kind",
    }
    classes = [cls for cls, *_ in recipe_config.METHODS.values() if cls]
    assert {f.name for f in fields(recipe_config.MethodKeys)} - {"type"} == {
        f.name for cls in classes for f in fields(cls)
    } - only_in_python
    for f in fields(recipe_config.MethodKeys):
        for own in [o for cls in classes for o in fields(cls) if o.name == f.name and f.default is not None]:
            assert own.default == f.default, f.name


def test_defaults_obey_their_own_rules():
    found = recipe_config.make_recipe(yaml.safe_load(recipe_config.recipe_yaml(recipe_config.Recipe())))
    assert found == recipe_config.Recipe()


@pytest.mark.parametrize(
    "text, says",
    [
        ("model: {nmae: x}", "unknown key model.nmae: did you mean model.name?"),
        ("rank: 8", "unknown key rank: did you mean method.rank?"),
        ("method: {rank: 0}", "method.rank must be a whole number, 1 or more, not 0"),
        ("method: {rank: 2.5}", "method.rank must be a whole number"),
        ("method: {rank: true}", "method.rank must be a whole number"),
        ("method: {dropout: 1}", "method.dropout must be a number, at least 0 and below 1, not 1"),
        ("train: {lr: .nan}", "train.lr must be"),
        ("train: {lr: .inf}", "train.lr must be"),
        ("train: {lr: -1e-3}", "not -0.001"),
        ("train: {schedule: liner}", "one of linear, cosine, constant, not 'liner'"),
        ("train: [1, 2]", "train must be a section with keys (lr, epochs"),
        ("- 1", "a recipe must be a section"),
        ("method: {rank: 8}\nmethod: {alpha: 8}", "method stands twice, in line 1 and line 2"),
        ("method:\n  rank: 8\n  rank: 4", "rank stands twice, in line 2 and line 3"),
        ("data: {source: movie, max_rows: 0}", "data.max_rows must be a whole number or null, 1 or more, not 0"),
        ("data: {source: [movie]}", "data.source must be text, not ['movie']"),
        ("{[1, 2]: 3}", "is not YAML"),
        ("data: {source: movie, labels: [yes, no]}", "put them in quotes"),
        ("data: {source: movie, labels: [a, b], cuts: [1, 2]}", "data.cuts has 2 cuts, so data.labels must name 3"),
        ("data: {source: movie, labels: [a, b, c], cuts: [2, 1]}", "data.cuts must rise"),
        ("data: {source: movie, labels: [a, a]}", "names a label twice"),
        ("data: {source: movie, labels: [a, null]}", "has a null"),
        ("data: {source: movie, test_size: 2.5}", "data.test_size must be a share below 1 or a whole number"),
        (
            "model: {dtype: bfloat16}\nmethod: {type: full}\ndata: {source: movie}",
            "too coarse to train every weight in",
        ),
        ("model: {device: gpu}", "model.device must be text or null, such as cpu, cuda, cuda:1, mps, xpu, not 'gpu'"),
        ("seed: 1", "data.source is missing"),
        ("", "data.source is missing"),
        ("data: {source: movie", "is not YAML"),
        ("data:\n\tsource: movie", "is not YAML"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_a_bad_configuration_is_named(tmp_path, text, says):
    (tmp_path / "it.yaml").write_text(text)
    with pytest.raises(ValueError) as e:
        recipe_config.load_recipe(tmp_path / "it.yaml")
    assert says in str(e.value) and "it.yaml" in str(e.value)


def test_a_configuration_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no configuration"):
        recipe_config.load_recipe(tmp_path / "gone.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"data: {source: \xff\xfe}")
    with pytest.raises(ValueError, match="bytes.yaml"):
        recipe_config.load_recipe(tmp_path / "bytes.yaml")


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda o: st.lists(o, max_size=3) | st.dictionaries(st.text(max_size=5), o, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([k["key"] for k in recipe_config.list_keys()]), junk, max_size=4))
@settings(max_examples=200, deadline=None)
def test_any_values_make_a_recipe_or_a_message(given):
    tree = {}
    for key, value in given.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    try:
        made = recipe_config.make_recipe(tree)
    except ValueError as e:
        assert any(k in str(e) for k in given)
    else:
        assert recipe_config.make_recipe(yaml.safe_load(recipe_config.recipe_yaml(made))) == made
        recipe_config.contradiction(made)


def test_paths_start_from_the_file(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/it.yaml").write_text(
        "data: {source: rows.jsonl, test_source: movie}\nforgetting: {texts: [newspaper, other.csv]}"
    )
    made = recipe_config.load_recipe(tmp_path / "there/it.yaml")
    assert made.data.source == str(tmp_path / "there/rows.jsonl") and made.data.test_source == "movie"
    assert made.forgetting.texts == ["newspaper", str(tmp_path / "there/other.csv")]


# The checks


def errors(recipe, out=None):
    return [(f.where, str(Problem(f.message, f.remedy))) for f in recipe_preflight.check(recipe, out).errors]


def test_a_good_recipe_has_no_errors(make, tmp_path):
    assert errors(make(), tmp_path / "new") == [] and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "keys, says",
    [
        (dict(texts=["gone.csv"]), "gone.csv"),
        (dict(tasks=["facts", "gone.jsonl"]), "gone.jsonl"),
        (dict(tasks=["lm_eval:no_such_task"]), "no_such_task|pip install lm_eval"),
        (dict(texts=[], tasks=[], prompts=0), "the battery is empty"),
    ],
)
def test_what_cannot_be_asked_is_said_before_anything_is_written(make, tmp_path, keys, says):
    [(where, message)] = errors(make(forgetting=keys))
    assert where == "forgetting" and re.search(says, message)
    with pytest.raises(recipe_checks.CheckFailed):
        recipe_run.run(make(forgetting=keys), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "rows, sections, where, says",
    [
        (good_rows() + ["{'broken': 1}"], {}, "data.source", "rows.jsonl:61: broken JSON"),
        (good_rows() + [{"text": "no label"}], {}, "data.source", "row 60: no field 'label'; it has 'text'"),
        (good_rows() + [{"text": 5, "label": "bad"}], {}, "data.source", "row 60: field 'text' must be text, not 5"),
        (good_rows() + [{"text": "  ", "label": "bad"}], {}, "data.source", "row 60: the text to classify is empty"),
        (good_rows() + [{"text": "a", "label": None}], {}, "data.source", "row 60: 'label' is empty"),
        (
            [dict(prompt=f"q{i}", completion="" if i < 3 else "a") for i in range(9)],
            dict(data=dict(test_size=2)),
            "data.source",
            "'completion' is empty",
        ),
        (
            [dict(prompt=f"q{i}", completion=i) for i in range(9)],
            dict(data=dict(test_size=2)),
            "data.source",
            "must be strings, or both lists of messages",
        ),
        (
            [dict(messages=[dict(role="user", content=f"q{i}")]) for i in range(9)],
            dict(data=dict(test_size=2)),
            "data.source",
            "needs a question and an answer",
        ),
        (
            [dict(question="q", answer="a")],
            {},
            "data.source",
            "no column looks like a label; there are 'question', 'answer'",
        ),
        (
            [dict(text=f"t{i}", label="same") for i in range(40)],
            {},
            "data.labels",
            "every training row has the label 'same'",
        ),
        ([dict(text=f"t{i}", label=str(i)) for i in range(60)], {}, "data.source", "has 60 different values"),
        (good_rows(20), {}, "data.test_size", "20 usable rows cannot give 20 to hold out"),
        ([dict(prompt="same", completion="a")] * 40, {}, "data.test_size", "1 usable rows cannot give 20"),
        (
            [dict(prompt="word " * 300 + str(i), completion="a") for i in range(9)],
            dict(data=dict(test_size=2)),
            "data.source",
            "the model's limit is 256 and max_length is None: set data.max_length to 256",
        ),
        (
            [dict(prompt="word " * 300 + str(i), completion="a") for i in range(9)],
            dict(data=dict(test_size=2, max_length=200)),
            "data.source",
            "every label is masked",
        ),
        (good_rows(), dict(data=dict(max_length=999)), "data.max_length", "999 tokens are more than"),
        (
            good_rows(),
            dict(method=dict(target_modules=["nope"])),
            "method",
            "matches nothing. These would match: q_proj (2)",
        ),
        (good_rows(), dict(method=dict(rank=64)), "method", "rank=64 is larger than"),
        (good_rows(), dict(model=dict(dtype="float16")), "model.dtype", "float16 needs a GPU"),
        (good_rows(), dict(model=dict(name="no/such/model")), "model.name", "no/such/model"),
        (
            [dict(prompt=f"q{i}", completion="ab"[i % 2]) for i in range(40)],
            dict(evaluate=dict(choices=["a", "c"])),
            "evaluate.choices",
            "'b' is an answer in the held-out rows",
        ),
        (
            good_rows(24),
            dict(train=dict(patience=2), data=dict(test_size=20)),
            "train.patience",
            "too few rows to keep some",
        ),
    ],
)
def test_bad_input_is_found(make, tmp_path, rows, sections, where, says):
    write_rows(tmp_path / "rows.jsonl", rows)
    found = errors(make(**sections))
    assert any(w == where and says in m for w, m in found), found


def test_a_missing_or_unreadable_file(make, tmp_path):
    (tmp_path / "beside.csv").write_text("text,label\n")
    assert "there is no file" in errors(make(data=dict(source=str(tmp_path / "gone.jsonl"))))[0][1]
    (tmp_path / "zip.jsonl").write_bytes(b"PK\x03\x04rest")
    assert "zip.jsonl" in errors(make(data=dict(source=str(tmp_path / "zip.jsonl"))))[0][1]
    assert "has no rows" in errors(make(data=dict(source=str(tmp_path / "beside.csv"))))[0][1]


def test_a_missing_chat_template(make, tiny, tmp_path):
    bare = shutil.copytree(tiny, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    config = json.loads((bare / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    found = errors(make(model=dict(name=str(bare))))
    assert [w for w, _ in found] == ["data.source"] and "has no chat template" in found[0][1]


def test_faults_of_the_folder(make, tmp_path, monkeypatch):
    recipe = make()
    (tmp_path / "file").write_text("")
    assert "is a file" in errors(recipe, tmp_path / "file/run")[0][1]
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("")
    assert "is not empty" in errors(recipe, tmp_path / "full")[0][1]
    monkeypatch.setattr(shutil, "disk_usage", lambda f: shutil._ntuple_diskusage(10, 10, 5_000_000))
    assert "5 MB free" in errors(recipe, tmp_path / "new")[0][1]


def test_a_folder_that_cannot_be_written(make, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(recipe_machine.tempfile, "NamedTemporaryFile", refuse)
    assert errors(make(), tmp_path / "new") == [("out", f"{tmp_path} cannot be written: Read-only file system")]


def test_several_faults_are_found_at_once(make, tmp_path):
    write_rows(tmp_path / "rows.jsonl", good_rows() + [{"text": "no label"}])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/x").write_text("")
    assert {w for w, _ in errors(make(method=dict(target_modules=["nope"])), tmp_path / "taken")} == {
        "data.source",
        "method",
        "out",
    }


def test_rows_are_named_as_in_the_file(make, tmp_path):
    rows = [dict(prompt=f"q{i}", completion="x" if i != 17 else " ") for i in range(40)]
    write_rows(tmp_path / "rows.jsonl", rows)
    p = recipe_preflight.prepare(make(data=dict(bad_rows="skip", test_size=5)))
    assert not p.findings.errors and any("row 17:" in f.message for f in p.findings if f.level == "warning")
    assert sorted(e.index for e in [*p.train, *p.test]) == [i for i in range(40) if i != 17]
    for e, row in zip([*p.train, *p.test], [*p.train_rows, *p.test_rows]):
        assert p.tokenizer.decode(e.input_ids).startswith(f"q{e.index}") and row["row"] == e.index


@given(st.lists(st.sampled_from(["good", "bad", "", None, 3]), min_size=30, max_size=60), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_no_row_vanishes(labels, seed):
    rows = [dict(text=f"text number {i % 40}", label=l) for i, l in enumerate(labels)]
    columns = dict(shape="classification", text_column="text", label_column="label")
    keys = recipe_config.DataKeys(labels=["bad", "good"], test_size=5, source="x", **columns)
    shaped, refused = recipe_rows.shape_rows(rows, keys, ["bad", "good"])
    assert sorted([s["row"] for s in shaped] + [i for i, _ in refused]) == list(range(len(rows)))
    p = recipe_checks.Prepared(recipe_config.Recipe(data=keys, seed=seed))
    kept = recipe_checks._only_once(p, shaped)
    halves = recipe_checks._split(p, kept)
    if halves:
        assert sorted(s["row"] for half in halves for s in half) == sorted(s["row"] for s in kept)


def test_the_test_may_come_from_elsewhere(make, tmp_path):
    other = write_rows(tmp_path / "test.jsonl", good_rows(5) + [dict(text="something new", label="bad")])
    p = recipe_preflight.prepare(make(data=dict(test_source=other)))
    assert not p.findings.errors and len(p.test) == 6 and len(p.train) == 55
    assert any("5 of its questions were in the training rows too" in f.message for f in p.findings)


# Judging


@pytest.mark.parametrize("prefix", [0, 20])
@pytest.mark.parametrize("choices", [[[5], [6], [7]], [[5], [5, 6], [5, 6, 7]], [[8, 9], [8, 10], [11]]])
def test_choices_are_scored_exactly(tiny, prefix, choices):
    model, _ = load_model(tiny, dtype="float32")
    torch.manual_seed(0)
    shared = torch.randint(100, 999, (prefix,)).tolist()
    prompts = [shared + torch.randint(100, 999, (n,)).tolist() for n in (1, 3, 3, 9, 30)]

    def slow(prompt, choice):
        with torch.no_grad():
            logp = model(torch.tensor([prompt + choice])).logits[0].log_softmax(-1)
        return sum(logp[len(prompt) - 1 + i, t].item() for i, t in enumerate(choice))

    want = torch.tensor([[slow(p, c) for c in choices] for p in prompts])
    for max_tokens in (1, 40, 4000):
        assert torch.allclose(
            forgetting_choices.choice_scores(model, prompts, choices, max_tokens=max_tokens), want, atol=1e-4
        )


@pytest.mark.parametrize("name", ["GPT2", "GPTNeoX", "Gemma2", "Mistral", "Mamba"])
def test_choices_in_other_families(name):
    import transformers

    small = dict(
        GPT2=dict(n_embd=32, n_layer=2, n_head=2), Mamba=dict(hidden_size=32, num_hidden_layers=2, state_size=4)
    ).get(
        name,
        dict(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            head_dim=8,
            sliding_window=6,
        ),
    )
    if name == "GPTNeoX":
        small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    torch.manual_seed(0)
    model = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(vocab_size=300, **small)
    ).eval()
    prompts = [list(range(20, 32)) + [n, n + 1, n + 2][: n % 3 + 1] for n in range(40, 48)]

    def slow(prompt, choice):
        with torch.no_grad():
            logp = model(torch.tensor([prompt + choice]), use_cache=False).logits[0].log_softmax(-1)
        return sum(logp[len(prompt) - 1 + i, t].item() for i, t in enumerate(choice))

    want = torch.tensor([[slow(p, c) for c in ([7], [8, 9])] for p in prompts])
    assert torch.allclose(forgetting_choices.choice_scores(model, prompts, [[7], [8, 9]]), want, atol=1e-4)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_solves_its_equation(kn):
    k, n = kn
    low, high = recipe_judge.wilson(k, n)
    assert -1e-9 <= low <= k / n + 1e-9 and k / n - 1e-9 <= high <= 1 + 1e-9
    for p in (low, high):
        assert abs(abs(k / n - p) - 1.959964 * (max(p * (1 - p), 0) / n) ** 0.5) < 1e-6


def test_the_bootstrap_agrees_with_theory():
    import numpy as np

    rng = np.random.default_rng(0)
    before = rng.normal(0, 1, 500)
    after = before + rng.normal(0.1, 0.3, 500)
    change, low, high = forgetting_lost.paired_bootstrap(before, after)
    d = after - before
    assert abs((high - low) - 2 * 1.96 * d.std() / 500**0.5) < 0.006 and abs(change - d.mean()) < 1e-12


# The run


def test_a_run_from_file_to_report(make, tmp_path):
    result = recipe_run.run(make(), tmp_path / "run", progress=False)
    facts = json.loads((tmp_path / "run/report.json").read_text())
    assert facts == result.facts and result.stopped == "finished"
    for key in (
        "accuracy_before",
        "accuracy_after",
        "n_eval",
        "tokens_per_second",
        "peak_memory_bytes",
        "forgetting",
        "seconds",
        "versions",
        "recipe",
        "seed",
        "accuracy_before_interval",
        "accuracy_change_interval",
    ):
        assert key in facts
    assert (
        facts["n_eval"] == 20
        and facts["steps"] == 10
        and len(facts["samples"]) == 4
        and set(facts["forgetting"]) == {"newspaper"}
    )
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == [
        "adapter",
        "before.json",
        "recipe.yaml",
        "report.html",
        "report.json",
    ]
    assert recipe_config.load_recipe(tmp_path / "run") == make()
    kept = facts["kept"]
    assert (
        len(kept["tasks"]) == 6 and kept["stopped"][2] == 2 and kept["divergence"][0] > 0 and len(kept["moved"]) == 14
    )
    html = (tmp_path / "run/report.html").read_text()
    assert "questions that have nothing to do with the task" in html and "matrices moved" in html


def test_a_full_run_tells_which_weights_moved(make, tmp_path):
    facts = recipe_run.run(
        make(method=dict(type="full"), model=dict(dtype=None), forgetting=dict(tasks=[], prompts=0)),
        tmp_path / "run",
        progress=False,
    ).facts
    kept = facts["kept"]
    # 14 matrices and the tied embedding
    assert len(kept["moved"]) == 15 and not kept["tasks"] and kept["accuracy"] is None and kept["divergence"] is None


def test_a_run_begun_without_a_battery_goes_on(make, tmp_path):
    recipe_run.run(make(), tmp_path / "run", progress=False)
    before = json.loads((tmp_path / "run/before.json").read_text())
    for name in ("report.json", "report.html"):
        (tmp_path / "run" / name).unlink()
    (tmp_path / "run/before.json").write_text(json.dumps({k: v for k, v in before.items() if k != "battery"}))
    assert recipe_run.run(make(), tmp_path / "run", resume=True, progress=False).facts["kept"] is None


def test_the_report_is_one_safe_page(make, tmp_path):
    rows = [dict(o, text=o["text"] + " <script>alert(1)</script>") for o in good_rows()]
    write_rows(tmp_path / "rows.jsonl", rows)
    html = recipe_run.run(make(), tmp_path / "run", progress=False).report.html()
    assert "&lt;script&gt;" in html and "<script" not in html
    assert not re.search(r"(src|href)\s*=\s*[\"']?\s*(https?:)?//|@import|url\(", html)
    for heading in (
        "Before and after",
        "Training",
        "forgotten",
        "learnt from",
        "cost",
        "checked",
        "try next",
        "Configuration",
    ):
        assert heading in html


def bare_facts(**changes):
    "The least that a report can be made of."
    facts = dict(
        accuracy_before=None,
        accuracy_after=None,
        loss_before=1.0,
        loss_after=0.5,
        loss_change=-0.5,
        loss_change_interval=[-0.6, -0.4],
        n_eval=9,
        n_left=0,
        tokens_per_second=1.0,
        peak_memory_bytes=1,
        memory_plan={},
        forgetting={},
        seconds=1.0,
        seconds_by_stage=dict(train=1.0),
        n_train=1,
        train_tokens=1,
        steps=1,
        trained_parameters=1,
        total_parameters=2,
        device="cpu",
        threads=2,
        dtype="float32",
        device_reasons=["r"],
        findings=[],
        history=[dict(step=1, loss=1.0, lr=0.1, eval_loss=None)],
        samples=[],
        recipe=asdict(recipe_config.Recipe()),
        seed=0,
        versions=dict(a="1"),
    )
    return json.loads(json.dumps(facts | changes))


def test_slots_are_shown():
    html = recipe_report.Report(
        bare_facts(), audit=["AUDIT"], plan=["PLAN"], preflight=["PREFLIGHT"], forgetting=["BATTERY"]
    ).html()
    assert all(word in html for word in ("AUDIT", "PLAN", "PREFLIGHT", "BATTERY"))


def test_a_report_escapes_rows_labels_and_file_names():
    evil = "<script>alert(1)</script>"
    sample = dict(row=0, question=evil, wanted=evil, before=evil, after=evil, right_before=False, right_after=False)
    finding = dict(level="warning", where=evil, message=evil, remedy=evil)
    lost = dict(name=evil, tokens=5, before=1.0, after=1.1, change=0.1, low=0.05, high=0.2)
    kept = dict(
        tasks={evil: [1, 2, 3]},
        accuracy=[0.1, 0.0, 0.2],
        stopped=[1, 1, 1],
        answers=[[evil, evil, evil]],
        divergence=[0.1, 0.0, 0.2],
        moved=[dict(name=evil, share=0.1, rank=1.0)],
    )
    keys = dict(asdict(recipe_config.Recipe()))
    keys["model"] = keys["model"] | dict(name=evil)
    keys["data"] = keys["data"] | dict(source=f"{evil}.csv".replace("/", ""), labels=[evil])
    missing = dict(part="mask", section="What it learnt from", what=evil, why=evil)
    changes = dict(samples=[sample, sample], findings=[finding], forgetting={evil: lost}, kept=kept, recipe=keys)
    more = dict(
        device=evil, device_reasons=[evil], memory_plan={evil: 5}, seconds_by_stage={evil: 1.0}, missing=[missing]
    )
    report = recipe_report.Report(
        bare_facts(**changes, **more, versions={evil: evil}),
        audit=[evil],
        plan=[evil],
        preflight=[evil],
        forgetting=[evil],
    )
    html = report.html()
    assert report.facts["missing"] == [missing], "every section is drawn"
    assert "<script" not in html and html.count("&lt;script&gt;") > 30
    assert "<script" not in report._repr_html_() and "&lt;script&gt;" in report._repr_html_()


def test_a_report_saves_a_page_or_a_folder(tmp_path):
    report = recipe_report.Report(bare_facts())
    assert report.save(tmp_path / "alone.html").read_text() == report.html()
    folder = report.save(tmp_path / "run")
    assert sorted(f.name for f in folder.iterdir()) == ["report.html", "report.json"]
    assert json.loads((folder / "report.json").read_text()) == report.facts


def test_a_run_without_choices(make, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [dict(prompt=f"what is {i}", completion=f"it is {i}") for i in range(40)])
    result = recipe_run.run(make(data=dict(test_size=10)), tmp_path / "run", progress=False)
    assert result.facts["accuracy_after"] is None and result.facts["loss_change_interval"][1] < 0
    assert "nats per learnt token" in result.report.html()


def test_plain_text_and_full_fine_tuning(make, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [dict(text=f"a line of text, number {i}") for i in range(40)])
    result = recipe_run.run(
        make(data=dict(test_size=10), method=dict(type="full"), model=dict(dtype=None), forgetting=dict(measure=False)),
        tmp_path / "run",
        progress=False,
    )
    assert result.facts["trained_parameters"] == result.facts["total_parameters"] and not result.facts["samples"]
    again, _ = load_model(tmp_path / "run/model", dtype="float32", device="cpu")
    for a, b in zip(result.model.parameters(), again.parameters()):
        assert torch.equal(a, b)


def test_a_folder_belongs_to_one_run(make, tmp_path):
    recipe_run.run(make(), tmp_path / "run", progress=False)
    with pytest.raises(recipe_checks.CheckFailed, match="holds another run"):
        recipe_run.run(make(), tmp_path / "run", progress=False)
    with pytest.raises(recipe_checks.CheckFailed, match="method.rank was 4 and is 2"):
        recipe_run.run(make(method=dict(rank=2)), tmp_path / "run", resume=True, progress=False)
    before = (tmp_path / "run/report.json").read_bytes()
    assert recipe_run.run(make(), tmp_path / "run", resume=True, progress=False).facts == json.loads(before)
    assert (tmp_path / "run/report.json").read_bytes() == before


class StopAt:
    "Send Ctrl-C, or raise, after a step."

    def __init__(self, step, how):
        self.step, self.how = step, how

    def __call__(self, state):
        if state.step == self.step:
            self.how()


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def crash():
    raise RuntimeError("the power went out")


@pytest.mark.parametrize("how, step", [(ctrl_c, 1), (ctrl_c, 5), (ctrl_c, 10), (crash, 3), (crash, 7)])
def test_a_stopped_run_goes_on_to_the_same_weights(make, tmp_path, monkeypatch, how, step):
    whole = recipe_run.run(make(), tmp_path / "whole", progress=False)
    with monkeypatch.context() as m:
        m.setattr(
            recipe_stages,
            "finetune",
            lambda *a, callbacks, **k: finetune(*a, **k, callbacks=[*callbacks, StopAt(step, how)]),
        )
        if how is ctrl_c:
            assert (stopped := recipe_run.run(make(), tmp_path / "run", progress=False)).stopped in (
                "interrupted",
                "finished",
            ) and stopped.facts
        else:
            pytest.raises(RuntimeError, recipe_run.run, make(), tmp_path / "run", progress=False)
    result = recipe_run.run(make(), tmp_path / "run", resume=True, progress=False)
    assert result.stopped == "finished" and (tmp_path / "run/report.json").exists()
    assert result.facts["accuracy_after"] == whole.facts["accuracy_after"]
    read = lambda o: (tmp_path / o / "adapter/adapter_model.safetensors").read_bytes()
    assert read("run") == read("whole")


def test_what_was_measured_before_is_kept(make, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(recipe_run, "apply_method", lambda *a: crash())
        pytest.raises(RuntimeError, recipe_run.run, make(), tmp_path / "run", progress=False)
    before = (tmp_path / "run/before.json").read_bytes()
    recipe_run.run(make(), tmp_path / "run", resume=True, progress=False)
    assert (tmp_path / "run/before.json").read_bytes() == before


@pytest.mark.parametrize("where", ["before.json", "report.html"])
def test_a_disk_that_fills_up(make, tmp_path, monkeypatch, where):
    write = Path.write_text

    def full(self, *args, **kwargs):
        if where in self.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return write(self, *args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="cannot be written: No space left on device.*kept there.*resume"):
            recipe_run.run(make(), tmp_path / "run", progress=False)
    assert not list((tmp_path / "run").glob(".*.part"))
    assert recipe_run.run(make(), tmp_path / "run", resume=True, progress=False).stopped == "finished"


def test_the_adapter_is_what_was_judged(make, tiny, tmp_path):
    recipe = make()
    result = recipe_run.run(recipe, tmp_path / "run", progress=False)
    model, _ = load_model(tiny, dtype="float32", device="cpu")
    load_adapter(model, tmp_path / "run/adapter")
    p = recipe_preflight.prepare(recipe)
    told = recipe_judge.measure(p, model, {})
    assert sum(told["right"]) / len(told["right"]) == result.facts["accuracy_after"]


@pytest.mark.parametrize(
    "method",
    [
        dict(type="houlsby", bottleneck_size=4),
        dict(type="parallel", bottleneck_size=4),
        dict(type="ia3"),
        dict(type="bitfit"),
        dict(type="prompt", num_virtual_tokens=4),
        dict(type="prefix", num_virtual_tokens=4, init="random"),
        dict(type="p_tuning", num_virtual_tokens=4),
        dict(type="lora", rank=4, use_dora=True, rank_pattern=dict(q_proj=2)),
        dict(type="lora", rank=4, init="pissa", lr_ratio=4, modules_to_save=["norm"]),
    ],
    ids=lambda m: "-".join(map(str, m.values())),
)
def test_every_method_runs_and_its_adapter_is_what_was_judged(make, tiny, tmp_path, method):
    recipe = make(method=method, evaluate=dict(samples=0), forgetting=dict(measure=False))
    facts = recipe_run.run(recipe, tmp_path / "run", progress=False).facts
    model, _ = load_model(tiny, dtype="float32", device="cpu")
    load_adapter(model, tmp_path / "run/adapter")
    p = recipe_preflight.prepare(recipe)
    told = recipe_judge.measure(p, model, {})
    assert sum(told["nats"]) / sum(told["targets"]) == pytest.approx(facts["loss_after"], rel=1e-5)
    assert facts["loss_after"] < facts["loss_before"]


@pytest.mark.parametrize("kind, optimizer", [("nf4", "adamw8bit"), ("int8", "adafactor"), ("nf4", None)])
def test_a_quantised_run_and_its_adapter_on_the_same_base(make, tiny, tmp_path, kind, optimizer):
    from ftbook.methods.quant_layer import QuantLinear
    from ftbook.methods.quant_files import load_quantized

    recipe = make(
        model=dict(quantize=kind),
        train=dict(optimizer=optimizer, lr=1e-2),
        evaluate=dict(samples=0),
        forgetting=dict(measure=False),
    )
    result = recipe_run.run(recipe, tmp_path / "run", progress=False)
    assert (
        sum(isinstance(m, QuantLinear) for m in result.model.modules()) == 14
        and result.facts["loss_after"] < result.facts["loss_before"]
    )
    assert (
        0 < result.facts["memory_plan"]["quantised weights"] < 14 * 64 * 64 * 4 / 3
        and f"load_quantized({str(tiny)!r}, {kind!r}, dtype='float32')"
        in recipe_words.loading_code(result.facts["recipe"])
    )
    model = load_adapter(load_quantized(tiny, kind, dtype="float32", device="cpu")[0], tmp_path / "run/adapter")
    told = recipe_judge.measure(recipe_preflight.prepare(recipe), model, {})
    assert sum(told["nats"]) / sum(told["targets"]) == pytest.approx(result.facts["loss_after"], rel=1e-5)


def test_what_cannot_be_quantised_is_refused_before_the_model_is_loaded(make, tiny, tmp_path):
    assert any(
        "pissa" in f.message
        for f in recipe_preflight.check(make(model=dict(quantize="nf4"), method=dict(init="pissa"))).errors
    )
    config = tiny_config(
        tiny, write_rows(tmp_path / "rows.jsonl", good_rows()), model=dict(quantize="nf4"), method=dict(type="full")
    )
    with pytest.raises(ValueError, match="model.quantize nf4 freezes the weights"):
        recipe_config.load_recipe(write_config(tmp_path / "recipe.yaml", config))


def test_a_run_with_another_optimizer_can_be_stopped_and_gone_on_with(make, tmp_path):
    recipe = make(train=dict(optimizer="adamw8bit"), evaluate=dict(samples=0), forgetting=dict(measure=False))
    whole = recipe_run.run(recipe, tmp_path / "whole", progress=False)
    real, steps = training_tune.finetune, []

    def until_four(model, examples, **kw):
        return real(
            model,
            examples,
            **kw
            | dict(
                callbacks=[
                    lambda state: (
                        steps.append(state.step) or os.kill(os.getpid(), signal.SIGINT) if state.step == 4 else None
                    )
                ]
            ),
        )

    with pytest.MonkeyPatch.context() as m:
        m.setattr(recipe_stages, "finetune", until_four)
        assert recipe_run.run(recipe, tmp_path / "run", progress=False).stopped == "interrupted" and steps == [4]
    assert recipe_run.run(recipe, tmp_path / "run", resume=True, progress=False).facts["loss_after"] == pytest.approx(
        whole.facts["loss_after"], rel=1e-5
    )


@pytest.mark.parametrize(
    "method, says",
    [
        (
            dict(type="houlsby", rank=4),
            (
                "method.rank does not belong to method.type houlsby. It has dropout, init, bottleneck_size, "
                "modules_to_save"
            ),
        ),
        (dict(type="full", use_dora=True), "method.use_dora does not belong to method.type full"),
        (dict(type="lora", num_virtual_tokens=2), "method.num_virtual_tokens does not belong to method.type lora"),
        (
            dict(type="lora", rank_pattern=dict(q_proj="many")),
            "method.rank_pattern must be names with a whole number each or null",
        ),
        (dict(type="prefix", gradient=1), "unknown key method.gradient"),
    ],
)
def test_what_does_not_belong_to_a_method_is_refused(tiny, tmp_path, method, says):
    config = tiny_config(tiny, write_rows(tmp_path / "rows.jsonl", good_rows()), method=method)
    with pytest.raises(ValueError, match=re.escape(says)):
        recipe_preflight.prepare(recipe_config.load_recipe(write_config(tmp_path / "recipe.yaml", config)))


def test_an_unknown_beginning_is_found_before_the_model_is_loaded(make):
    assert any(
        "init='magic' is not known" in f.message for f in recipe_preflight.check(make(method=dict(init="magic"))).errors
    )


def test_a_prefix_with_checkpointing_is_refused_before_the_model_is_loaded(make):
    found = recipe_preflight.check(
        make(method=dict(type="prefix", num_virtual_tokens=4), train=dict(gradient_checkpointing=True))
    )
    assert any("gradient checkpointing" in f.message for f in found.errors)


def test_a_method_that_changes_something_at_once_is_refused(make, tmp_path, monkeypatch):
    class Loud(LoRA):
        def inject_(self, model):
            super().inject_(model)
            for n, q in model.named_parameters():
                if "lora_B" in n:
                    torch.nn.init.normal_(q.data, std=30)

    monkeypatch.setattr(recipe_stages, "make_method", lambda recipe, tokenizer: Loud(rank=4))
    with pytest.raises(recipe_checks.CheckFailed, match="changes the loss"):
        recipe_run.run(make(), tmp_path / "run", progress=False)


def test_the_same_seed_gives_the_same_run(make, tmp_path):
    a, b, c = (
        recipe_run.run(make(seed=s), tmp_path / n, progress=False).facts for s, n in ((1, "a"), (1, "b"), (2, "c"))
    )
    assert [h["loss"] for h in a["history"]] == [h["loss"] for h in b["history"]] != [h["loss"] for h in c["history"]]
    assert [s["row"] for s in a["samples"]] != [s["row"] for s in c["samples"]]


# From a bare file


def write_reviews(path, n=60):
    "Good rows under names of their own, in the format that the ending says."
    rows = [dict(id=i, review=r["text"], verdict=r["label"]) for i, r in enumerate(good_rows(n))]
    if path.suffix == ".jsonl":
        write_rows(path, rows)
    elif path.suffix == ".csv":
        path.write_text("\n".join(["id,review,verdict", *(",".join(map(str, r.values())) for r in rows)]) + "\n")
    else:
        import pyarrow as pa, pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def small_changes(tiny, **sections):
    "What makes a run of a bare file small."
    config = tiny_config(tiny, "", **sections)
    del config["data"]["source"]
    return config


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_bare_file_goes_to_a_report(tiny, tmp_path, monkeypatch, capsys, ending):
    monkeypatch.chdir(tmp_path)
    write_reviews(tmp_path / f"reviews.{ending}")
    result = recipe_run.run(f"reviews.{ending}", **small_changes(tiny))
    assert result.folder == tmp_path / "ftbook-runs/reviews" and result.stopped == "finished"
    assert (result.folder / "report.html").exists() and result.facts["n_eval"] == 20
    made = recipe_config.load_recipe(result.folder)
    assert (made.data.text_column, made.data.label_column, made.data.labels) == ("review", "verdict", ["bad", "good"])
    written, said = (result.folder / "recipe.yaml").read_text(), capsys.readouterr().err
    assert set(recipe_machine._flat(yaml.safe_load(written))) == {k["key"] for k in recipe_config.list_keys()}
    assert all(line in said for line in written.splitlines()), "every default is shown"
    again = recipe_run.run("ftbook-runs/reviews", progress=False)
    assert again.facts == result.facts
    with pytest.raises(recipe_checks.CheckFailed, match="holds another run"):
        recipe_run.run(f"reviews.{ending}", progress=False, **small_changes(tiny))


def test_every_kind_of_source_is_the_same_run(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = small_changes(tiny, evaluate=dict(samples=0), forgetting=dict(measure=False))
    first = recipe_run.run(write_reviews(tmp_path / "reviews.csv"), "first", progress=False, **changes)
    made = recipe_config.load_recipe("first")
    for n, source in enumerate([made, asdict(made), "first/recipe.yaml", Path("first")]):
        other = recipe_run.run(source, f"run{n}", progress=False)
        assert same_files(first.folder, other.folder)
        assert (other.folder / "recipe.yaml").read_bytes() == (first.folder / "recipe.yaml").read_bytes()


def test_a_folder_goes_on_with_its_run(make, tmp_path, monkeypatch):
    whole = recipe_run.run(make(), tmp_path / "whole", progress=False)
    with monkeypatch.context() as m:
        m.setattr(recipe_run, "note_training", lambda *a: crash())
        pytest.raises(RuntimeError, recipe_run.run, make(), tmp_path / "run", progress=False)
    assert recipe_run.run(tmp_path / "run", progress=False).stopped == "finished"
    assert same_files(tmp_path / "run", whole.folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="there is no configuration .*empty/recipe.yaml"):
        recipe_run.run(tmp_path / "empty", progress=False)


def test_a_bare_file_that_cannot_be_told_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "pairs.jsonl", [dict(question=f"what is {i}?", answer=f"it is {i}") for i in range(30)])
    with pytest.raises(ValueError, match="pairs.jsonl, label_column: no column looks like a label"):
        recipe_run.run("pairs.jsonl", progress=False)
    assert [f.name for f in tmp_path.iterdir()] == ["pairs.jsonl"]


# Writes that are interrupted


class Killed(BaseException):
    "Ends a process at once, as nothing else does."


class Watch:
    "Sees what happens to the files below a folder, and ends the process before one of its renames."

    def __init__(self, folder, last=None):
        self.folder, self.last, self.renames, self.opened = str(folder) + os.sep, last, 0, []

    def __call__(self, event, args):
        if event == "os.rename" and str(args[1]).startswith(self.folder):
            self.renames += 1
            if self.renames == self.last:
                raise Killed
        if event == "open" and str(args[0]).startswith(self.folder) and args[2] & (os.O_WRONLY | os.O_RDWR):
            self.opened.append(str(args[0])[len(self.folder) :])


@pytest.fixture(scope="module")
def watching():
    "A list; the last `Watch` in it is told of every file that is opened or renamed."
    found = []
    sys.addaudithook(lambda event, args: found and event in ("open", "os.rename") and found[-1](event, args))
    yield found
    found.clear()


def seen(watching, watch, *args, **kwargs):
    "Run while somebody watches."
    watching.append(watch)
    try:
        return recipe_run.run(*args, progress=False, **kwargs)
    finally:
        watching.pop()


def whole_files(folder):
    "Every file that is not hidden, as bytes; all of them must be whole."
    from safetensors.torch import load_file

    found = {}
    for f in folder.rglob("*") if folder.exists() else ():
        if f.is_file() and not any(part.startswith(".") for part in f.relative_to(folder).parts):
            found[f.relative_to(folder).as_posix()] = f.read_bytes()
            json.loads(f.read_text()) if f.suffix == ".json" else None
            load_file(f) if f.suffix == ".safetensors" else None
    return found


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_that_ends_at_any_write_leaves_the_old_state_and_goes_on(make, tmp_path, watching, method):
    recipe = make(
        method=dict(type=method),
        model=dict(dtype=None if method == "full" else "float32"),
        train=dict(max_steps=2, save_every=1),
        evaluate=dict(rows=4, samples=0),
        forgetting=dict(measure=False),
    )
    watch = Watch(tmp_path / "whole")
    seen(watching, watch, recipe, tmp_path / "whole")
    assert watch.opened and all(any(p.startswith(".") for p in Path(o).parts) for o in watch.opened), (
        "no file that can be seen is written in its place"
    )
    result = "adapter/adapter_model.safetensors" if method == "lora" else "model/model.safetensors"
    wanted, before = whole_files(tmp_path / "whole"), {}
    for n in range(1, watch.renames + 1):
        folder = tmp_path / f"run{n}"
        with pytest.raises(Killed):
            seen(watching, Watch(folder, n), recipe, folder)
        left = whole_files(folder)
        assert all(left[name] for name in left)
        before = left
        recipe_run.run(recipe, folder, resume=True, progress=False)
        ended = whole_files(folder)
        assert ended.keys() == wanted.keys() and ended[result] == wanted[result], f"rename {n}"
    assert before.keys() == wanted.keys() - {"report.json"} | {
        k for k in before if k.startswith(("checkpoints", "trained"))
    }


# What the report says to do

use_it = """
import json, os, sys, accelerate, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
for folder, code, ids in json.load(open(sys.argv[1])):
    assert not [name for name in sys.modules if name.startswith("ftbook")]
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, folder
        continue
    os.chdir(folder)        # from here on a Python that has imported nothing of the book
    names = {}
    exec(code, names)
    with torch.no_grad(): torch.save(names["model"](input_ids=torch.tensor(ids)).logits, "logits.pt")
    sys.stdout.flush(); os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_the_report_says_to_do_gives_the_trained_model_in_a_fresh_python(make, tmp_path):
    kinds = {
        "lora": dict(method=dict(type="lora", rank=4)),
        "ia3": dict(method=dict(type="ia3")),
        "prompt": dict(method=dict(type="prompt", num_virtual_tokens=4)),
        "prefix": dict(method=dict(type="prefix", num_virtual_tokens=4, init="random")),
        "houlsby": dict(method=dict(type="houlsby", bottleneck_size=4)),
        "nf4-ia3": dict(model=dict(quantize="nf4"), method=dict(type="ia3")),
    }
    jobs, wanted, plain, ids = [], {}, {}, torch.randint(3, 49152, (2, 9), generator=torch.Generator().manual_seed(0))
    for name, sections in kinds.items():
        result = recipe_run.run(
            make(
                **sections,
                train=dict(lr=3e-2, max_steps=4),
                evaluate=dict(rows=4, samples=0),
                forgetting=dict(measure=False),
            ),
            tmp_path / name,
            progress=False,
        )
        [code] = re.findall(r"Use it</a></h2>\n<pre>(.*?)</pre>", (tmp_path / name / "report.html").read_text(), re.S)
        jobs.append((str(tmp_path / name), html.unescape(code), ids.tolist()))
        with torch.no_grad():
            wanted[name] = result.model.eval()(input_ids=ids).logits
        with torch.no_grad():
            plain[name] = remove_(result.model)(input_ids=ids).logits
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-c", use_it, str(tmp_path / "jobs.json")],
        capture_output=True,
        text=True,
        env=os.environ | dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"),
    )
    assert done.returncode == 0, done.stderr
    for name in kinds:
        found = torch.load(tmp_path / name / "logits.pt", weights_only=True)
        assert (
            torch.allclose(found[:, -9:], wanted[name][:, -9:], atol=1e-4)
            and (wanted[name] - plain[name]).abs().max() > 1e-2
        ), name


def test_every_method_of_a_recipe_has_a_module_that_load_adapter_imports():
    from ftbook.methods.protocol import HOMES

    assert {cls.peft_type: cls.__module__ for cls, *_ in recipe_config.METHODS.values() if cls} == HOMES


# A judge that fails


def trained(value):
    return hasattr(value, "ftbook_method")


def broken(real, when=lambda *args: True):
    "A function that raises where `when` holds of its arguments."

    def call(*args, **kwargs):
        if when(*args):
            raise RuntimeError("the judge is ill")
        return real(*args, **kwargs)

    return call


def same_files(a, b):
    "Have two runs left the same adapter, to the byte, and the same files?"
    files = [sorted(f.name for f in o.iterdir()) for o in (a, b)]
    adapters = [(o / "adapter/adapter_model.safetensors").read_bytes() for o in (a, b)]
    return files[0] == files[1] and adapters[0] == adapters[1]


def measured(facts):
    "What was found out by a run, without the time that it took and the memory that was free."
    found = {
        k: v
        for k, v in facts.items()
        if k.startswith(("accuracy", "loss", "n_", "forgetting", "kept", "samples", "missing", "steps", "stopped"))
    }
    return found | dict(checked=[(f["level"], f["where"]) for f in facts["findings"]])


@pytest.mark.parametrize(
    "method",
    [dict(modules_to_save=["embed_tokens"]), dict(target_modules=["embed_tokens", "q_proj"])],
    ids=["whole", "low rank"],
)
def test_a_run_that_trains_the_embedding_ends_with_an_adapter_that_loads(make, tiny, tmp_path, method):
    recipe = make(method=method)
    facts = recipe_run.run(recipe, tmp_path / "run", progress=False).facts
    assert facts["missing"] == [] and facts["kept"]["divergence"][0] > 0 and set(facts["forgetting"]) == {"newspaper"}
    model = load_adapter(load_model(tiny, dtype="float32", device="cpu")[0], tmp_path / "run/adapter")
    told = recipe_judge.measure(recipe_preflight.prepare(recipe), model, {})
    assert sum(told["nats"]) / sum(told["targets"]) == pytest.approx(facts["loss_after"], rel=1e-5)


@pytest.mark.parametrize(
    "module, name, when, part",
    [
        (recipe_judge, "choice_scores", trained, "rows"),
        (recipe_judge, "write_answers", trained, "answers"),
        (recipe_judge, "measure_battery", trained, "battery"),
        (recipe_judge, "_texts_read", trained, "texts"),
        (recipe_facts, "compare_losses", None, "texts"),
        (recipe_facts, "moved", None, "changes"),
        (recipe_run, "show_mask", None, "mask"),
        (recipe_report, "draw_losses", None, "Training"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_judge_that_fails_costs_its_part_and_not_the_run(
    make, tiny, tmp_path, monkeypatch, capsys, module, name, when, part
):
    whole = recipe_run.run(make(), tmp_path / "whole", progress=False)
    with monkeypatch.context() as m:
        m.setattr(module, name, broken(getattr(module, name), *([lambda model, *rest: when(model)] if when else [])))
        result = recipe_run.run(make(), tmp_path / "run")
    assert result.stopped == "finished" and [o["part"] for o in result.facts["missing"]] == [part]
    assert re.match(r"RuntimeError: the judge is ill \(test_recipe.py, line \d+\)$", result.facts["missing"][0]["why"])
    assert "the report lacks" in repr(result) and (
        part == "Training" or "warning: the report will lack" in capsys.readouterr().err
    )
    assert json.loads((tmp_path / "run/report.json").read_text()) == result.facts
    html = (tmp_path / "run/report.html").read_text()
    assert "the judge is ill" in html and "ftbook train FOLDER --resume" in html
    load_adapter(load_model(tiny, dtype="float32", device="cpu")[0], tmp_path / "run/adapter")
    same = {k: v for k, v in measured(whole.facts).items() if k != "missing"}
    assert part not in ("mask", "Training") or same == {k: measured(result.facts)[k] for k in same}
    monkeypatch.setattr(recipe_stages, "finetune", lambda *args, **kwargs: pytest.fail("it was trained again"))
    again = recipe_run.run(make(), tmp_path / "run", resume=True, progress=False)
    assert measured(again.facts) == measured(whole.facts) and same_files(tmp_path / "run", tmp_path / "whole")
    assert (
        set(again.facts["seconds_by_stage"]) == set(whole.facts["seconds_by_stage"])
        and "the judge is ill" not in (tmp_path / "run/report.html").read_text()
    )


def test_a_judge_that_fails_for_good_fails_again_and_the_run_stays(make, tmp_path, monkeypatch):
    monkeypatch.setattr(
        recipe_judge, "choice_scores", broken(forgetting_choices.choice_scores, lambda model, *rest: trained(model))
    )
    first = recipe_run.run(make(), tmp_path / "run", progress=False)
    again = recipe_run.run(make(), tmp_path / "run", resume=True, progress=False)
    assert (
        measured(first.facts) == measured(again.facts)
        and again.facts["accuracy_after"] is None
        and again.facts["loss_after"] is None
    )
    assert "was not measured" in again.report.html() and "trained in 10 steps and saved" in recipe_words.summary_line(
        again.facts
    )


def test_a_prompt_that_refuses_a_judges_rows_is_kept(make, tmp_path, capsys):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sliding = Gemma3TextConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        pad_token_id=2,
        eos_token_id=2,
        bos_token_id=1,
    )
    folder = save_tiny_model(tmp_path / "gemma")
    Gemma3ForCausalLM(sliding).save_pretrained(folder)
    facts = recipe_run.run(
        make(model=dict(name=str(folder)), method=dict(type="prompt", num_virtual_tokens=4)), tmp_path / "run"
    ).facts
    [lack] = facts["missing"]
    assert (
        lack["part"] == "battery"
        and "left padding in a sliding window" in lack["why"]
        and facts["forgetting"]
        and facts["loss_after"] is not None
    )
    assert "left padding in a sliding window" in capsys.readouterr().err
    load_adapter(load_model(folder, dtype="float32", device="cpu")[0], tmp_path / "run/adapter")


def test_every_judge_may_fail_at_once(make, tmp_path, monkeypatch):
    for name in ("choice_scores", "write_answers", "measure_battery", "_texts_read"):
        monkeypatch.setattr(
            recipe_judge, name, broken(getattr(recipe_judge, name), lambda model, *rest: trained(model))
        )
    facts = recipe_run.run(make(), tmp_path / "run", progress=False).facts
    assert {o["part"] for o in facts["missing"]} == {"rows", "answers", "battery", "texts"} and (
        tmp_path / "run/adapter"
    ).is_dir()


@pytest.mark.parametrize("name", ["choice_scores", "write_answers", "measure_battery", "_texts_read"])
def test_a_judge_that_fails_before_the_training_ends_the_run(make, tmp_path, monkeypatch, name):
    monkeypatch.setattr(recipe_judge, name, broken(getattr(recipe_judge, name)))
    with pytest.raises(RuntimeError, match="the judge is ill"):
        recipe_run.run(make(), tmp_path / "run", progress=False)
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == ["recipe.yaml"]


def test_a_whole_model_is_judged_again_as_it_was_saved(make, tmp_path, monkeypatch):
    recipe = make(
        method=dict(type="full"),
        model=dict(dtype=None),
        train=dict(patience=1, eval_every=2, epochs=4),
        forgetting=dict(tasks=[], prompts=0),
    )
    with monkeypatch.context() as m:
        m.setattr(
            recipe_run,
            "measure_together",
            broken(recipe_judge.measure_together, lambda job, p, model, before=None, *rest: before),
        )
        # what no part of the judgement foresees
        pytest.raises(RuntimeError, recipe_run.run, recipe, tmp_path / "run", progress=False)
    before = (tmp_path / "run/model/model.safetensors").read_bytes()
    assert not (tmp_path / "run/report.json").exists()
    monkeypatch.setattr(recipe_stages, "finetune", lambda *args, **kwargs: pytest.fail("it was trained again"))
    result = recipe_run.run(recipe, tmp_path / "run", resume=True, progress=False)
    assert (
        result.facts["missing"] == []
        and len(result.facts["kept"]["moved"]) == 15
        and result.facts["trained_parameters"] == result.facts["total_parameters"]
    )
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == before
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == [
        "before.json",
        "model",
        "recipe.yaml",
        "report.html",
        "report.json",
    ]


def test_what_one_process_lacks_all_lack(make, tmp_path, monkeypatch):
    import accelerate.utils

    p, job, texts = (
        recipe_preflight.prepare(make()),
        recipe_job.Job(make(), tmp_path, progress=False),
        dict(newspaper=dict(nats=[1.0, 2.0], targets=[1, 1])),
    )
    job.world, parts = 2, dict(right=[True, False], nats=[0.1, 0.2], targets=[1, 1], answers=["a"], texts=texts)
    other = parts | dict(answers=[])
    monkeypatch.setattr(recipe_judge, "measure_battery", lambda *args: None)
    monkeypatch.setattr(recipe_judge, "measure", lambda *args: parts)
    ill = [dict(part="answers", section="s", what="w", why="RuntimeError: the judge is ill")]
    monkeypatch.setattr(accelerate.utils, "gather_object", lambda mine: [*mine, (other, ill)])
    found = recipe_judge.measure_together(job, p, None, {}, attempt := recipe_judge.Attempts())
    assert (
        found["answers"] == []
        and found["right"] == [True, True, False, False]
        and found["texts"]["newspaper"]["nats"] == [1.0, 1.0, 2.0, 2.0]
    )
    assert [(o["part"], o["why"]) for o in attempt.missing] == [("answers", "RuntimeError: the judge is ill")]


@pytest.mark.slow
def test_the_main_job(tmp_path):
    facts = recipe_run.quickstart(tmp_path / "run", progress=False).facts
    assert facts["n_eval"] >= 500 and facts["accuracy_before"] < 0.70 and facts["accuracy_after"] >= 0.87


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4294967296 bytes"),
        MemoryError(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_out_of_memory_names_the_item_of_the_plan(tiny, tmp_path, monkeypatch, error):
    def fail(*args, **kw):
        raise error

    monkeypatch.setattr(recipe_stages, "finetune", fail)
    config = tiny_config(tiny, write_rows(tmp_path / "rows.jsonl", good_rows()))
    with pytest.raises(
        recipe_stages.NotEnoughMemory,
        match=r"(?s)there was not enough memory.*GiB are there; the plan wants .*What helps: a lower train.max_tokens",
    ):
        recipe_run.run(recipe_config.make_recipe(config), tmp_path / "out", progress=False)


def test_another_error_of_training_passes(tiny, tmp_path, monkeypatch):
    def fail(*args, **kw):
        raise RuntimeError("mat1 and mat2")

    monkeypatch.setattr(recipe_stages, "finetune", fail)
    with pytest.raises(RuntimeError, match="^mat1 and mat2$"):
        recipe_run.run(
            recipe_config.make_recipe(tiny_config(tiny, write_rows(tmp_path / "rows.jsonl", good_rows()))),
            tmp_path / "out",
            progress=False,
        )
