"The recipe: bad input is named before anything is written."

import errno, json, os, re, shutil

import pytest, torch

from ftbook.recipe import checks as recipe_checks, machine as recipe_machine
from ftbook.recipe import config as recipe_config
from ftbook.recipe import job as recipe_job
from ftbook.recipe import judge as recipe_judge
from ftbook.recipe import preflight as recipe_preflight
from ftbook.recipe import run as recipe_run
from ftbook.recipe import stages as recipe_stages
from ftbook.methods.lora_method import LoRA
from tiny import good_rows, tiny_config, write_config, write_rows
from cases.recipe import errors, make, tiny


# The configuration


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


# The checks


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
            "the model's limit is 256: set data.max_length to 256",
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
    assert [w for w, _ in found] == ["data.source"] and "need a chat template, and the tokenizer has none" in found[0][1]


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
    assert errors(make(), tmp_path / "new") == [("out", f"{tmp_path} cannot be written: Read-only file system: choose another folder, or change its permissions")]


def test_several_faults_are_found_at_once(make, tmp_path):
    write_rows(tmp_path / "rows.jsonl", good_rows() + [{"text": "no label"}])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/x").write_text("")
    assert {w for w, _ in errors(make(method=dict(target_modules=["nope"])), tmp_path / "taken")} == {
        "data.source",
        "method",
        "out",
    }


# The run


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


# From a bare file


def test_a_bare_file_that_cannot_be_told_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "pairs.jsonl", [dict(question=f"what is {i}?", answer=f"it is {i}") for i in range(30)])
    with pytest.raises(ValueError, match="pairs.jsonl, label_column: no column looks like a label"):
        recipe_run.run("pairs.jsonl", progress=False)
    assert [f.name for f in tmp_path.iterdir()] == ["pairs.jsonl"]


# A judge that fails


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
