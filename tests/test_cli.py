"What the commands promise: a clear message for bad input, an exit code, JSON alone on standard output, nothing lost."

import errno, json, os, re, resource, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ftbook import cli
from ftbook.forgetting import battery as forgetting_battery
from ftbook.models import shipped as models_shipped
from ftbook.recipe import config as recipe_config
from ftbook.recipe import judge as recipe_judge
from ftbook.recipe import run as recipe_run
from tiny import good_rows, save_tiny_model, tiny_config, write_config, write_rows

command = [sys.executable, "-c", "from ftbook.cli import main; main()"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def desk(tiny, tmp_path, monkeypatch):
    "An empty folder to work in, with a good file of rows and a good configuration."
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", good_rows())
    write_config(tmp_path / "it.yaml", tiny_config(tiny, "rows.jsonl"))
    return tmp_path


def ftbook(*args):
    """Run a command in this process.

    Whatever happens, it must end as a command does: with a code, and without a traceback.
    """
    done = CliRunner().invoke(cli.app, [str(a) for a in args], prog_name="ftbook")
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.output
    return done


def files(folder):
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# The shape of a command


@pytest.mark.parametrize(
    "name", ["", "quickstart", "train", "check", "audit", "plan", "recommend", "fewshot", "merge", "models"]
)
def test_help(name):
    done = ftbook(*[name] * bool(name), "--help")
    assert done.exit_code == 0 and done.stdout.startswith(f"Usage: ftbook {name}".strip())
    if name:
        assert "--json" in done.stdout and "--debug" in done.stdout


@pytest.mark.parametrize("name", ["train", "check"])
def test_help_shows_every_key(name):
    told = " ".join(ftbook(name, "--help").stdout.split())
    for key in recipe_config.list_keys():
        assert key["key"] in told and " ".join(key["help"].split()) in told, key["key"]


def test_version():
    from ftbook import __version__

    assert ftbook("--version").stdout.split() == [__version__]


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


def test_nothing_heavy_is_loaded_for_help():
    done = subprocess.run(
        [
            *command[:2],
            (
                "import sys; from ftbook.cli import app\ntry: app(['--help'])\nfinally: print({'torch', "
                "'transformers', 'yaml', 'numpy'} & set(sys.modules))"
            ),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.endswith("set()\n"), done.stdout


def test_models():
    told = json.loads(ftbook("models", "--json").stdout)
    assert [m["name"] for m in told["models"]] == list(models_shipped.SHIPPED) and told["reasons"]
    shown = ftbook("models").stdout
    assert all(m["name"] in shown for m in told["models"]) and told["reasons"][0] in shown


# Bad input

broken = [
    # rows, sections of the configuration, the key that is named, what is said
    (good_rows() + ["{'broken': 1}"], {}, "data.source", r"rows.jsonl:61: broken JSON"),
    (good_rows() + ['["a", "list"]'], {}, "data.source", r"rows.jsonl:61: "),
    (good_rows() + [{"text": "no label"}], {}, "data.source", r"row 60: no field 'label'; it has 'text'"),
    ([dict(question="q")], {}, "data.source", r"the rows have the fields 'question'; wanted are messages"),
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
        r"row \d+, max_length: .*\d+ tokens, the model's limit is 256: set data.max_length to 256",
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
        r"'query'.* matches nothing. These would match: q_proj \(2\), k_proj \(2\), v_proj",
    ),
    (good_rows(), dict(method=dict(target_modules=".*query")), "method", r"matches nothing. These would match: q_proj"),
]


@pytest.mark.parametrize("name", ["check", "train"])
@pytest.mark.parametrize("rows, sections, where, says", broken, ids=[b[3] for b in broken])
def test_bad_input_is_said_and_nothing_is_written(desk, tiny, name, rows, sections, where, says):
    write_rows(desk / "rows.jsonl", rows)
    write_config(desk / "it.yaml", tiny_config(tiny, "rows.jsonl", **sections))
    before = files(desk)
    done = ftbook(name, "it.yaml")
    said = done.stdout if name == "check" else done.stderr
    assert done.exit_code == 1 and re.search(says, said) and where in said, done.output
    told = json.loads(ftbook(name, "it.yaml", "--json").stdout)
    found = told if name == "check" else told["findings"]
    assert any(f["level"] == "error" and f["where"] == where and re.search(says, f["message"]) for f in found)
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
        assert done.exit_code == 1 and "has no chat template" in done.output


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


def start(*args, **more):
    "Start a command as a terminal would."
    return subprocess.Popen(
        [*command, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )


def finish(process):
    "Wait for its end: (exit code, stdout, stderr)."
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in out + err, err
    return process.returncode, out, err


def wait_for(path, process):
    "Wait until a running command has made a file."
    end = time.time() + 60
    while not list(Path().glob(path)):
        assert process.poll() is None and time.time() < end, process.stderr.read()
        time.sleep(0.005)


@pytest.fixture(scope="module")
def long(tiny, tmp_path_factory):
    "A longer run that nothing disturbed: its folder, and what it wrote on stdout and stderr."
    desk = tmp_path_factory.mktemp("long")
    write_rows(desk / "rows.jsonl", good_rows())
    write_config(
        desk / "it.yaml",
        tiny_config(
            tiny,
            "rows.jsonl",
            train=dict(epochs=30, save_every=20),
            method=dict(dropout=0.1),
            forgetting=dict(prompts=0),
        ),
    )
    code, out, err = finish(start("train", "it.yaml", "--json", cwd=desk))
    assert code == 0, err
    return desk, out, err


def same_result(a, b):
    "Do two runs have the same adapter, to the byte, and the same findings?"
    read = lambda o: (o / "adapter/adapter_model.safetensors").read_bytes()
    facts = lambda o: {
        k: v
        for k, v in json.loads((o / "report.json").read_text()).items()
        if k.startswith(("accuracy", "loss", "steps", "n_", "forgetting", "samples"))
    }
    return read(a) == read(b) and facts(a) == facts(b)


def test_json_is_alone_on_stdout(long):
    desk, out, err = long
    assert json.loads(out) == json.loads((desk / "ftbook-runs/it/report.json").read_text())
    assert "judge the model as it is" in err and "train" in err


def test_what_a_person_sees(desk):
    done = ftbook("train", "it.yaml", "--out", "here")
    assert done.exit_code == 0 and done.stdout.splitlines()[-2:] == [
        "report   here/report.html",
        "adapter  here/adapter",
    ]
    assert re.search(r"^[\d.]+% right before, [\d.]+% after, on 20 held-out rows; gain ", done.stdout, re.M)
    again = ftbook("train", "here", "--resume")
    assert again.exit_code == 0 and again.stdout == done.stdout and "this run has ended" in again.stderr


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


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_goes_on_to_the_same_end(long, tmp_path, monkeypatch, how):
    shutil.copytree(long[0], tmp_path / "desk", ignore=shutil.ignore_patterns("ftbook-runs"))
    monkeypatch.chdir(tmp_path / "desk")
    process = start("train", "it.yaml", "--json")
    wait_for("ftbook-runs/it/checkpoints/step-*", process)
    process.send_signal(how)
    code, out, err = finish(process)
    if how == signal.SIGINT:
        told = json.loads(out)
        assert code == 130 and 20 <= told["step"] < 300 and f"interrupted after step {told['step']}" in err
        assert "Go on with: ftbook train ftbook-runs/it --resume" in err and told["error"] in err
    else:
        assert code == -signal.SIGKILL and out == ""
    assert not Path("ftbook-runs/it/report.json").exists()
    done = ftbook("train", "ftbook-runs/it", "--resume", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["resumed_from"] >= 20, done.stderr
    assert same_result(long[0] / "ftbook-runs/it", Path("ftbook-runs/it"))


def test_ctrl_c_before_the_first_step(long, tmp_path, monkeypatch):
    shutil.copytree(long[0], tmp_path / "desk", ignore=shutil.ignore_patterns("ftbook-runs"))
    monkeypatch.chdir(tmp_path / "desk")
    process = start("train", "it.yaml")
    wait_for("ftbook-runs/it/recipe.yaml", process)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code == 130 and out == "" and "interrupted" in err and "--resume" in err
    assert ftbook("train", "it.yaml", "--resume").exit_code == 0
    assert same_result(long[0] / "ftbook-runs/it", Path("ftbook-runs/it"))


def test_a_disk_that_fills_up_while_it_trains(long, tmp_path, monkeypatch):
    shutil.copytree(long[0], tmp_path / "desk", ignore=shutil.ignore_patterns("ftbook-runs"))
    monkeypatch.chdir(tmp_path / "desk")
    size = (long[0] / "ftbook-runs/it/adapter/adapter_model.safetensors").stat().st_size
    # no checkpoint fits, for it holds the optimizer too
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    code, out, err = finish(start("train", "it.yaml", "--json", preexec_fn=limit))
    assert code == 1 and re.search(
        r"could not be written|cannot be written: File too large", json.loads(out)["error"]
    ), err
    assert Path("ftbook-runs/it/before.json").exists() and not list(Path("ftbook-runs/it/checkpoints").glob("step-*"))
    assert ftbook("train", "it.yaml", "--resume").exit_code == 0
    assert same_result(long[0] / "ftbook-runs/it", Path("ftbook-runs/it"))


# A bare file


def settings(config):
    "The same configuration as options of a command."
    return [
        o
        for section, keys in config.items()
        for key, value in keys.items()
        for o in ("--set", f"{section}.{key}={json.dumps(value)}")
    ]


def write_reviews(path, n=60):
    rows = [f"{i},{r['text']},{r['label']}" for i, r in enumerate(good_rows(n))]
    path.write_text("\n".join(["id,review,verdict", *rows]) + "\n")


def test_a_bare_file_is_trained_as_by_the_function(desk, tiny):
    write_reviews(desk / "reviews.csv")
    config = tiny_config(tiny, "", evaluate=dict(samples=0), forgetting=dict(measure=False))
    del config["data"]["source"]
    checked = ftbook("check", "reviews.csv", *settings(config))
    assert checked.exit_code == 0 and "60 rows read; 40 to train on, 20 to judge by" in checked.stdout
    done = ftbook("train", "reviews.csv", *settings(config))
    assert done.exit_code == 0 and done.stdout.splitlines()[-2:] == [
        "report   ftbook-runs/reviews/report.html",
        "adapter  ftbook-runs/reviews/adapter",
    ]
    ours = Path("ftbook-runs/reviews")
    assert all(line in done.stderr for line in (ours / "recipe.yaml").read_text().splitlines())
    other = recipe_run.run("reviews.csv", "other", progress=False, **config)
    assert same_result(ours, other.folder)
    assert (ours / "recipe.yaml").read_bytes() == (other.folder / "recipe.yaml").read_bytes()
    again = ftbook("train", "ftbook-runs/reviews", "--json")
    assert again.exit_code == 0 and json.loads(again.stdout) == json.loads((ours / "report.json").read_text())
    assert ftbook("train", "reviews.csv", *settings(config)).exit_code == 1


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


def audited(desk, *args):
    rows = [
        dict(text=f"A film about the {n}th summer of a long war.", label="fine" if n % 2 else "dull") for n in range(12)
    ]
    write_rows(
        desk / "films.jsonl", [*rows, rows[3], dict(text="Dear {{ name }},", label="dull"), dict(text="", label="fine")]
    )
    return ftbook("audit", "films.jsonl", "--encoder", "none", *args)


def test_an_audit_writes_a_report_and_leaves_the_rows_alone(desk):
    done = audited(desk, "--out", "out")
    assert done.exit_code == 0 and "duplicates.exact: 1 row" in done.stdout and "form.residue" in done.stdout
    assert sorted(f.name for f in (desk / "out").iterdir()) == ["findings.json", "findings.parquet", "report.html"]
    before = (desk / "films.jsonl").read_bytes()
    cleaned = audited(desk, "--clean")
    assert cleaned.exit_code == 0 and (desk / "films.jsonl").read_bytes() == before
    kept, left = ((desk / f"films.{name}.jsonl").read_text().splitlines() for name in ("clean", "left_out"))
    assert len(kept) + len(left) == 15 and [json.loads(l)["row"] for l in left] == sorted(
        json.loads(l)["row"] for l in left
    )


def test_an_audit_for_programs(desk):
    told = json.loads(audited(desk, "--json").stdout)
    assert told["rows"] == 15 and {f["where"] for f in told["findings"]} >= {
        "form.unusable",
        "duplicates.exact",
        "form.residue",
    }
    assert audited(desk, "--strict").exit_code == 1  # there is an error among the findings


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


def test_held_out_rows_and_benchmarks_are_looked_for(desk):
    write_rows(desk / "held.jsonl", [dict(text="a film about the 3th summer of a LONG war", label="fine")])
    (desk / "texts.txt").write_text("A film about the 5th summer of a long war.\n")
    found = {
        f["where"]: f["rows"]
        for f in json.loads(audited(desk, "--json", "--test", "held.jsonl", "--benchmarks", "texts.txt").stdout)[
            "findings"
        ]
    }
    assert (
        found["leakage.benchmark"] == 1
        and sum(n for where, n in found.items() if where in ("leakage.exact", "leakage.near")) >= 1
    )


def test_a_plan_says_what_fits_and_draws_it(desk, tiny):
    done = ftbook("plan", tiny, "--device", "cpu", "--seq-len", "64")
    assert done.exit_code == 0 and "adapters" in done.stdout and "fits in 24 GiB" in done.stdout
    assert (desk / "ftbook-plans" / f"{Path(tiny).name}.svg").read_text().lstrip().startswith("<svg")
    told, packed = (
        json.loads(ftbook("plan", tiny, "--device", "cpu", "--json", *more).stdout)
        for more in ((), ("--quantize", "nf4"))
    )
    assert told["fits"] and 0 < told["peak"] == sum(told["items"].values()) and packed["items"] != told["items"]


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


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    from test_fewshot import save_tiny_encoder

    return save_tiny_encoder(tmp_path_factory.mktemp("encoder"))


def topics(desk, n=8, names=("kitchen", "sea")):
    from test_fewshot import sentences, write_csv

    return write_csv(desk / "topics.csv", [("text", "label"), *zip(*sentences(n, classes=names))])


def test_fewshot_for_a_person_and_for_a_program(desk, encoder):
    topics(desk)
    done = ftbook("fewshot", "topics.csv", "--shots", "4", "--encoder", encoder)
    assert (
        done.exit_code == 0
        and "% right on the labelled rows that were not trained on" in done.stdout
        and "ftbook-fewshot/topics/report.html" in done.stdout
    )
    folder = desk / "ftbook-fewshot" / "topics"
    assert sorted(f.name for f in folder.iterdir()) == ["model", "next.csv", "report.html", "report.json"]
    facts = json.loads(ftbook("fewshot", "topics.csv", "--encoder", encoder, "--out", "again", "--json").stdout)
    assert facts["folder"] == "again" and facts["n_train"] == 16 and facts["classes"] == ["kitchen", "sea"]


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
    from test_fewshot import write_csv

    if rows:
        write_csv(desk / "few.csv", rows)
    before = files(desk)
    done = ftbook("fewshot", "few.csv", "--encoder", encoder, *options)
    assert done.exit_code == 1 and says in done.stderr and done.stdout == "", done.output
    assert files(desk) == before


# Models into one


@pytest.fixture
def pair(tiny, desk):
    "Two models that differ from a base a little, and a configuration."
    import torch
    from safetensors.torch import load_file, save_file

    for seed, name in enumerate(("red", "blue")):
        shutil.copytree(tiny, desk / name)
        file, generator = desk / name / "model.safetensors", torch.Generator().manual_seed(seed)
        save_file(
            {k: v + 0.01 * torch.randn(v.shape, generator=generator) for k, v in load_file(file).items()},
            file,
            metadata=dict(format="pt"),
        )
    (desk / "both.yaml").write_text(
        (
            f"merge_method: task_arithmetic\nbase_model: {tiny}\nmodels:\n- {{model: red, parameters: {{weight: "
            f"0.5}}}}\n- {{model: blue, parameters: {{weight: 0.5}}}}\n"
        )
    )
    return desk


def test_merge_is_the_function(pair):
    from safetensors.torch import load_file
    from ftbook.merging.engine import merge

    planned = json.loads(ftbook("merge", "both.yaml", "--plan", "--json").stdout)
    assert (
        planned["method"] == "task_arithmetic"
        and len(planned["models"]) == 3
        and planned["bytes_written"] > 0
        and not (pair / "ftbook-merges").exists()
    )
    done = ftbook("merge", "both.yaml")
    assert done.exit_code == 0 and "ftbook-merges/both" in done.stdout, done.output
    merge("both.yaml", pair / "other")
    ours, same = (
        load_file(pair / "ftbook-merges" / "both" / "model.safetensors"),
        load_file(pair / "other" / "model.safetensors"),
    )
    assert all(bool((ours[k] == same[k]).all()) for k in same | ours)
    again = ftbook("merge", "both.yaml")
    assert (
        again.exit_code == 1
        and "overwrite" in again.stderr
        and ftbook("merge", "both.yaml", "--overwrite").exit_code == 0
    )


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


def test_a_merge_says_its_notes_once(pair, tiny):
    (pair / "one.yaml").write_text(
        f"merge_method: task_arithmetic\nbase_model: {tiny}\nmodels:\n- {{model: red, parameters: {{weight: 0.5}}}}\n"
    )
    done = ftbook("merge", "one.yaml")
    assert (
        done.exit_code == 0
        and (done.stdout + done.stderr).count("one model only") == 1
        and "ftbook-merges/one" in done.stdout
    ), done.output
