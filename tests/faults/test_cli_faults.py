"The commands: a clear message for bad input, an exit code, and nothing written."

import errno, json, os, re, shutil, tempfile

import pytest
from typer.testing import CliRunner

from ftbook import cli
from ftbook.forgetting import battery as forgetting_battery
from ftbook.recipe import config as recipe_config, judge as recipe_judge
from ftbook.recipe import run as recipe_run
from tiny import good_rows, tiny_config, write_config, write_rows
from cases.cli import desk, encoder, ftbook, pair, tiny, write_reviews


def files(folder):
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# The shape of a command


@pytest.mark.parametrize(
    "line",
    [
        "nothing",
        "train",
        "check",
        "check it.yaml --rank 8",
        "quickstart --seed -1",
        "quickstart --seed one",
        "train a b",
        "models x",
    ],
)
def test_a_wrong_command_is_told_apart(line):
    done = ftbook(*line.split())
    assert done.exit_code == 2 and done.stdout == "" and "Usage: ftbook" in done.stderr


# Bad input

broken = [
    # rows, sections of the configuration, the key that is named, what is said
    (good_rows() + ["{'broken': 1}"], {}, "data.source", r"rows.jsonl:61: broken JSON"),
    (good_rows() + ['["a", "list"]'], {}, "data.source", r"rows.jsonl:61: "),
    (good_rows() + [{"text": "no label"}], {}, "data.source", r"row 60: no field 'label'; it has 'text'"),
    (
        [dict(question="q", answer="a")],
        {},
        "data.source",
        r"no column looks like a label; there are 'question', 'answer'",
    ),
    (good_rows() + [{"text": 5, "label": "bad"}], {}, "data.source", r"row 60: field 'text' must be text, not 5"),
    (
        [dict(prompt=f"q{i}", completion=i) for i in range(29)],
        {},
        "data.source",
        r"row \d+: none of 9 rows can be used; this one: .*must be strings",
    ),
    (
        [dict(messages=f"q{i}") for i in range(29)],
        {},
        "data.source",
        r"row \d+: none of 9 rows can be used; this one: field 'messages' must be a list",
    ),
    (
        [dict(prompt=f"q{i}", completion="" if i < 3 else "a") for i in range(29)],
        {},
        "data.source",
        r"row 0: .*'completion' is empty",
    ),
    (
        [dict(prompt="word " * 240 + str(i), completion="a") for i in range(29)],
        dict(data=dict(max_length=200)),
        "data.source",
        r"every label is masked",
    ),
    (
        [dict(prompt="word " * 300 + str(i), completion="a") for i in range(29)],
        {},
        "data.source",
        r"row \d+: .*\d+ tokens, the model's limit is 256.* -> set data.max_length to 256",
    ),
    (
        good_rows(),
        dict(data=dict(source="gone.jsonl")),
        "data.source",
        r"there is no file .*gone.jsonl; beside it: rows.jsonl",
    ),
    (good_rows(), dict(model=dict(name="no/such-model")), "model.name", r"no/such-model"),
    (
        good_rows(),
        dict(method=dict(target_modules=["query"])),
        "method",
        r"'query'.* matches nothing -> These would match: q_proj \(2\), k_proj \(2\), v_proj",
    ),
    (good_rows(), dict(method=dict(target_modules=".*query")), "method", r"matches nothing -> These would match: q_proj"),
]


@pytest.mark.parametrize("name", ["check", "train"])
@pytest.mark.parametrize("rows, sections, where, says", broken, ids=[b[3] for b in broken])
def test_bad_input_is_said_and_nothing_is_written(desk, tiny, name, rows, sections, where, says):
    write_rows(desk / "rows.jsonl", rows)
    write_config(desk / "it.yaml", tiny_config(tiny, "rows.jsonl", **sections))
    before = files(desk)
    done = ftbook(name, "it.yaml")
    said = " ".join((done.stdout if name == "check" else done.stderr).split())
    assert done.exit_code == 1 and re.search(says, said) and where in said, done.output
    told = json.loads(ftbook(name, "it.yaml", "--json").stdout)
    found = told if name == "check" else told["findings"]
    errors = [f for f in found if f["level"] == "error" and f["where"] == where]
    assert any(re.search(says, f"{f['message']} -> {f['remedy']}") for f in errors)
    assert files(desk) == before and not (desk / "ftbook-runs").exists()


@pytest.mark.parametrize("content", [b"PK\x03\x04\xff", b"\x89PNG\r\n", b""])
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_a_file_that_cannot_be_read(desk, tiny, ending, content):
    (desk / f"rows.{ending}").write_bytes(content)
    write_config(desk / "it.yaml", tiny_config(tiny, f"rows.{ending}"))
    done = ftbook("check", "it.yaml")
    assert done.exit_code == 1 and re.search(rf"error +data.source: .*rows.{ending}", done.stdout), done.output


def test_a_folder_and_a_forbidden_file_as_rows(desk, tiny, monkeypatch):
    (desk / "folder.jsonl").mkdir()
    write_config(desk / "it.yaml", tiny_config(tiny, "folder.jsonl"))
    done = ftbook("check", "it.yaml")
    assert done.exit_code == 1 and re.search(r"error +data.source: .*folder.jsonl", done.stdout), done.output


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read(desk):
    (desk / "rows.jsonl").chmod(0)
    done = ftbook("check", "it.yaml")
    assert done.exit_code == 1 and re.search(r"error +data.source: .*rows.jsonl", done.stdout)


def test_a_missing_chat_template(desk, tiny):
    bare = shutil.copytree(tiny, desk / "bare")
    (bare / "chat_template.jinja").unlink()
    write_config(desk / "it.yaml", tiny_config(bare, "rows.jsonl"))
    for name in ("check", "train"):
        done = ftbook(name, "it.yaml")
        assert done.exit_code == 1 and "messages need a chat template, and the tokenizer has none" in done.output


@pytest.mark.parametrize(
    "text, says",
    [
        ("method: {rank: 0}", "method.rank must be a whole number, 1 or more, not 0"),
        ("method: {rank: -3}", "1 or more, not -3"),
        ("method: {rank: eight}", "not 'eight'"),
        ("method: {rnak: 8}", "did you mean method.rank?"),
        ("metod: {rank: 8}", "unknown key metod"),
        ("seed: 0\nseed: 1", "seed stands twice, in line 1 and line 2"),
        ("data: {source: rows.jsonl", "is not YAML"),
        ("data: {source: 3}", "data.source must be text, not 3"),
        ("data: {source: rows.jsonl, labels: [yes, no]}", "put them in quotes"),
        ("", "data.source is missing"),
        ("just words", "a recipe must be a section"),
    ],
)
@pytest.mark.parametrize("name", ["check", "train"])
def test_a_bad_configuration_is_said(desk, name, text, says):
    (desk / "it.yaml").write_text(text)
    done = ftbook(name, "it.yaml")
    assert done.exit_code == 1 and done.stdout == "" and says in done.stderr and "it.yaml" in done.stderr
    assert says in json.loads(ftbook(name, "it.yaml", "--json").stdout)["error"]


def test_a_problem_is_told_in_lines_and_in_fields(desk):
    (desk / "it.yaml").write_text("method: {rnak: 8}")
    done = ftbook("check", "it.yaml")
    keys = "type, rank, alpha"
    assert done.stderr.startswith(
        f"ftbook: it.yaml, method.rnak\n  unknown key method.rnak\n  -> did you mean method.rank? Keys in method: {keys}"
    )
    told = json.loads(ftbook("check", "it.yaml", "--json").stdout)["problem"]
    assert (told["file"], told["key"], told["row"], told["why"]) == (
        "it.yaml",
        "method.rnak",
        None,
        "unknown key method.rnak",
    )


def test_all_wrong_keys_are_told_at_once(desk):
    (desk / "it.yaml").write_text("method: {rnak: 8}\ntrain: {lr: fast}")
    done = ftbook("train", "it.yaml")
    assert done.exit_code == 1 and done.stderr.startswith("ftbook: it.yaml\n")
    assert "unknown key method.rnak" in done.stderr and "train.lr must be a number" in done.stderr
    told = json.loads(ftbook("train", "it.yaml", "--json").stdout)["problem"]["problems"]
    assert sorted(p["key"] for p in told) == ["method.rnak", "train.lr"]


def test_keys_are_listed_and_the_schema_is_written(desk):
    told = ftbook("keys").stdout
    assert all(key["key"] in told for key in recipe_config.list_keys())
    assert json.loads(ftbook("keys", "--schema").stdout) == recipe_config.recipe_schema()
    assert [k["key"] for k in json.loads(ftbook("keys", "--json").stdout)] == [
        k["key"] for k in recipe_config.list_keys()
    ]


def test_a_configuration_that_is_not_there(desk):
    done = ftbook("check", "gone.yaml")
    assert done.exit_code == 1 and done.stderr == "ftbook: there is no configuration gone.yaml\n"


def test_a_loss_that_is_not_finite(desk, tiny):
    write_config(desk / "it.yaml", tiny_config(tiny, "rows.jsonl", train=dict(lr=1e36, max_grad_norm=None, warmup=0)))
    done = ftbook("train", "it.yaml")
    assert done.exit_code == 1 and re.search(r"step \d+: the .* is (nan|inf).*The batch held rows", done.stderr), (
        done.stderr[-800:]
    )


# The folder


def test_a_folder_that_is_taken(desk):
    (desk / "file").write_text("mine")
    (desk / "full").mkdir()
    (desk / "full/note.txt").write_text("mine")
    for name in ("check", "train"):
        assert (
            "is a file, so there can be no folder" in (done := ftbook(name, "it.yaml", "--out", "file/run")).output
            and done.exit_code == 1
        )
        assert "full is not empty" in (done := ftbook(name, "it.yaml", "--out", "full")).output and done.exit_code == 1
    assert files(desk / "full") == {"note.txt": b"mine"} and (desk / "file").read_text() == "mine"


def test_a_folder_that_holds_another_run(desk, tiny):
    assert ftbook("train", "it.yaml").exit_code == 0
    before = files(desk / "ftbook-runs")
    for name in ("check", "train"):
        done = ftbook(name, "it.yaml")
        assert done.exit_code == 1 and "holds another run" in done.output and "--resume" in done.output
    write_config(desk / "it.yaml", tiny_config(tiny, "rows.jsonl", method=dict(rank=2)))
    done = ftbook("train", "it.yaml", "--resume")
    assert done.exit_code == 1 and "method.rank was 4 and is 2" in done.stderr
    assert files(desk / "ftbook-runs") == before


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_is_read_only(desk, monkeypatch, number):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    for name in ("check", "train"):
        done = ftbook(name, "it.yaml")
        assert done.exit_code == 1 and f"cannot be written: {os.strerror(number)}" in done.output
    assert not (desk / "ftbook-runs").exists()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(desk):
    (desk / "shut").mkdir(mode=0o500)
    done = ftbook("train", "it.yaml", "--out", "shut/run")
    assert done.exit_code == 1 and "cannot be written: Permission denied" in done.stderr


def test_too_little_room_is_known_before(desk, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda f: shutil._ntuple_diskusage(10**9, 10**9, 5_000_000))
    for name in ("check", "train"):
        assert (
            done := ftbook(name, "it.yaml")
        ).exit_code == 1 and "has 5 MB free; checkpoints and result need" in done.output


# Runs, in processes of their own


def test_a_judge_that_fails_is_a_warning_and_the_way_to_judge_again(desk, monkeypatch):
    real = forgetting_battery.measure_battery

    def ill(model, *rest):
        if hasattr(model, "ftbook_method"):
            raise RuntimeError("the judge is ill")
        return real(model, *rest)

    with monkeypatch.context() as m:
        m.setattr(recipe_judge, "measure_battery", ill)
        done = ftbook("train", "it.yaml", "--out", "here")
        told = json.loads(ftbook("train", "here", "--resume", "--json").stdout)
    assert done.exit_code == 0 and done.stdout.splitlines()[-3:] == [
        "report   here/report.html",
        "adapter  here/adapter",
        "again    ftbook train here --resume",
    ]
    assert (
        "; the report lacks what it answers to other questions and requests" in done.stdout
        and "warning: the report will lack" in done.stderr
    )
    assert [m["part"] for m in told["missing"]] == ["battery"] and "the judge is ill" in told["missing"][0]["why"]
    again = ftbook("train", "here", "--resume")
    assert (
        again.exit_code == 0
        and "again" not in again.stdout
        and "lack" not in again.stdout
        and "this run is trained, and its report lacks" in again.stderr
    )
    assert "this run has ended" in ftbook("train", "here", "--resume").stderr


# A bare file


@pytest.mark.parametrize(
    "args, says",
    [
        (["reviews.csv", "--set", "train.epocks=2"], "did you mean train.epochs?"),
        (["reviews.csv", "--set", "train.epochs"], "--set takes KEY=VALUE"),
        (["reviews.csv", "--set", "out=here"], "unknown key out"),
        (["reviews.csv", "--set", "data.label_column=stars"], "there is no column 'stars'"),
        (["reviews.csv", "--set", "method.rank=0"], "method.rank must be a whole number, 1 or more, not 0"),
        (["gone.csv"], "there is no file"),
        (["pairs.jsonl"], "no column looks like a label; there are 'question', 'answer'"),
    ],
)
@pytest.mark.parametrize("name", ["check", "train"])
def test_what_a_bare_file_lacks_is_said_and_nothing_is_written(desk, name, args, says):
    write_reviews(desk / "reviews.csv")
    write_rows(desk / "pairs.jsonl", [dict(question=f"what is {i}?", answer=f"it is {i}") for i in range(30)])
    before = files(desk)
    done = ftbook(name, *args)
    assert done.exit_code == 1 and done.stdout == "" and says in done.stderr, done.output
    assert files(desk) == before


# Faults


def test_a_fault_of_ours_says_so(desk, monkeypatch):
    monkeypatch.setattr(recipe_run, "run", lambda *a, **k: {}["gone"])
    done = ftbook("train", "it.yaml", "--json")
    assert (
        done.exit_code == 1
        and "KeyError: 'gone'. This is a fault of ftbook; --debug shows where" in done.stderr
        and "KeyError" in json.loads(done.stdout)["error"]
    )
    assert isinstance(CliRunner().invoke(cli.app, ["train", "it.yaml", "--debug"]).exception, KeyError)


# The audit


@pytest.mark.parametrize(
    "args, says",
    [
        (("nowhere.csv",), "nowhere.csv"),
        (("films.jsonl", "--text-column", "body"), "no column 'body'; there are 'text', 'label'"),
        (("films.jsonl", "--test", "gone.csv"), "gone.csv"),
        (("films.jsonl", "--benchmarks", "gone.txt"), "gone.txt"),
        (("films.jsonl", "--model", "gone"), "gone"),
        (("somebody/rows", "--clean"), "--clean writes beside a file"),
    ],
)
def test_an_audit_of_what_is_not_there(desk, args, says):
    write_rows(desk / "films.jsonl", [dict(text="A film.", label="fine")] * 3)
    done = ftbook("audit", "--encoder", "none", *args)
    assert done.exit_code == 1 and says in done.output
    assert not (desk / "ftbook-audits").exists()


@pytest.mark.parametrize(
    "args, says",
    [
        (("--memory-gib", "0"), "24"),
        (("--method", "magic"), "--method must be one of lora, houlsby"),
        (("--quantize", "nf3"), "--quantize must be one of nf4"),
        (("--method", "full", "--quantize", "nf4"), "take an adapter"),
        (("--method", "ia3", "--rank", "2"), "--rank does not belong to --method ia3"),
        (("--optimizer", "lion"), "optimizer must be one of adamw"),
        (("--sharding", "magic"), "magic"),
    ],
)
def test_a_plan_that_cannot_be(desk, tiny, args, says):
    done = ftbook("plan", tiny, "--device", "cpu", *args)
    assert done.exit_code == 1 and says in done.output and not (desk / "ftbook-plans").exists()


# A classifier from a few rows


@pytest.mark.parametrize(
    "rows, options, says",
    [
        (None, [], "there is no file"),
        ([("text", "label"), ("a", "x"), ("b", "x")], [], "needs two or more"),
        ([("text", "label"), ("a", "x"), ("b", "X"), ("c", "x"), ("d", "X")], [], "differ by case"),
        ([("text", "label"), ("a", "x"), ("b", "y")], ["--text-column", "body"], "there are 'text', 'label'"),
        ([("text", "label"), ("a", "x"), ("b", "y")], ["--out", "rows.jsonl"], "exists and holds something"),
    ],
)
def test_fewshot_says_what_is_wrong_and_writes_nothing(desk, encoder, rows, options, says):
    from cases.fewshot import write_csv

    if rows:
        write_csv(desk / "few.csv", rows)
    before = files(desk)
    done = ftbook("fewshot", "few.csv", "--encoder", encoder, *options)
    assert done.exit_code == 1 and says in done.stderr and done.stdout == "", done.output
    assert files(desk) == before


# Models into one


@pytest.mark.parametrize(
    "old, new, options, says",
    [
        ("weight: 0.5", "wieght: 0.5", [], "wieght"),
        ("task_arithmetic", "telepathy", [], "telepathy"),
        ("red", "green", [], "green"),
        ("", "", ["--shard", "big"], "--shard must be a size such as 5GB"),
        ("", "", ["red"], "choose another folder"),
    ],
)
def test_merge_says_what_is_wrong_and_writes_nothing(pair, old, new, options, says):
    (pair / "both.yaml").write_text((pair / "both.yaml").read_text().replace(old, new))
    before = files(pair)
    done = ftbook("merge", "both.yaml", *(options if options != ["red"] else [pair / "red"]))
    assert done.exit_code == 1 and says in done.stderr and done.stdout == "", done.output
    assert files(pair) == before
