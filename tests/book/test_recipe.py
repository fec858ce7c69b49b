"What the recipe promises: the choice is exact, a run goes from file to report, and its adapter is what was judged."

import html, json, os, re, subprocess, sys
from dataclasses import asdict
from pathlib import Path

import pytest, torch, yaml
from hypothesis import given, settings, strategies as st

from ftbook.forgetting import choices as forgetting_choices
from ftbook.recipe import checks as recipe_checks, machine as recipe_machine, words as recipe_words
from ftbook.recipe import config as recipe_config
from ftbook.recipe import judge as recipe_judge
from ftbook.recipe import preflight as recipe_preflight
from ftbook.recipe import report as recipe_report
from ftbook.recipe import rows as recipe_rows
from ftbook.recipe import run as recipe_run
from ftbook.methods.files import load_adapter
from ftbook.methods.fold import remove_
from ftbook.models.load import load_model
from tiny import good_rows, tiny_config, write_rows
from cases.recipe import bare_facts, errors, make, same_files, tiny


# The checks


def test_a_good_recipe_has_no_errors(make, tmp_path):
    assert errors(make(), tmp_path / "new") == [] and not (tmp_path / "new").exists()


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


# The run


def test_a_run_from_file_to_report(make, tmp_path):
    recipe = make(forgetting=dict(tasks=["facts"]))
    result = recipe_run.run(recipe, tmp_path / "run", progress=False)
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
    assert recipe_config.load_recipe(tmp_path / "run") == recipe
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


# A judge that fails


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
