"The bench's harness: what is missing, shares, resuming, half a line, two writers, disturbance, commands."

import json, subprocess, sys, types
from concurrent.futures import ThreadPoolExecutor

import harness
import pytest
import rivals
from harness import Study, append, disturbed, machine, share, undisturbed, write_results

from book import nbs, root
from ftbook.problem import Problem
from ftbook.results import read_results

HERE = machine()


@pytest.fixture
def study(tmp_path, monkeypatch):
    "A study of four runs, one of them wanted twice, that counts how often it measures."
    module = types.SimpleNamespace(KEY=("task", "seed"), calls=[])

    def plan(runs):
        for seed in (0, 1):
            for task in ("movie", "news"):
                yield dict(task=task, seed=seed)
        yield dict(task="movie", seed=0)

    def run(job):
        module.calls.append(job)
        return dict(accuracy=job["seed"] / 2)

    module.plan, module.run = plan, run
    made = Study("tried", tmp_path)
    made.__dict__["module"] = module
    return made


def test_a_run_is_made_as_often_as_it_is_planned(study):
    assert len(study.missing()) == 5
    while jobs := study.missing():
        study.measure(jobs[0])
    runs = study.read()["runs"]
    assert len(runs) == len(study.module.calls) == 5
    assert sum((r["task"], r["seed"]) == ("movie", 0) for r in runs) == 2
    assert all(r["accuracy"] == r["seed"] / 2 and r["machine"] == 0 and r["others"] >= 0 for r in runs)


def test_what_is_there_is_not_measured_again(study):
    study.append([dict(task="news", seed=1, accuracy=0.9)])
    assert dict(task="news", seed=1) not in study.missing()
    assert len(study.missing()) == 4


def test_another_machine_measures_again(study, monkeypatch):
    study.append([dict(task="news", seed=1, accuracy=0.9)])
    monkeypatch.setattr(harness, "cpu_name", lambda: "another processor")
    assert len(study.missing()) == 4
    assert len(study.missing(this_machine=True)) == 5


def test_shares_part_the_runs_and_only_picks(study):
    shares = [[study.key(j) for j in study.missing(share=(i, 3))] for i in range(3)]
    assert sorted(sum(shares, [])) == sorted(study.key(j) for j in study.missing())
    assert not set(shares[0]) & set(shares[1])
    study.measure(study.missing()[0])  # what is measured moves nothing from one share to another
    assert [study.key(j) for j in study.missing(share=(1, 3))] in (shares[1], shares[1][1:])
    assert {j["task"] for j in study.missing(only=[("task", "news")])} == {"news"}
    assert {j["seed"] for j in study.missing(only=[("seed", "1")])} == {1}


def test_a_plan_sees_the_runs_that_are_there(study):
    study.module.plan = lambda runs: [dict(task="next", seed=len(runs))] if len(runs) < 3 else []
    while jobs := study.missing():
        study.measure(jobs[0])
    assert [r["seed"] for r in study.read()["runs"]] == [0, 1, 2]


def test_a_plan_of_this_machine_sees_the_runs_of_this_machine(study, monkeypatch):
    study.module.plan = lambda runs: [dict(task="next", seed=n) for n in range(len(runs) + 1)]
    study.append([dict(task="next", seed=seed) for seed in (0, 1)])
    monkeypatch.setattr(harness, "cpu_name", lambda: "another processor")
    assert [j["seed"] for j in study.missing(this_machine=True)] == [0]
    study.measure(study.missing(this_machine=True)[0])
    assert [j["seed"] for j in study.missing(this_machine=True)] == [1]


def test_what_is_known_of_a_study_is_in_its_file_once(study):
    study.module.ABOUT = dict(rows=dict(train=64))
    for job in study.missing()[:2]:
        study.measure(job)
    assert study.read()["rows"] == dict(train=64) and len(study.path.read_text().splitlines()) == 4
    study.module.ABOUT = dict(rows=dict(train=96))
    study.measure(study.missing()[0])
    assert study.read()["rows"] == dict(train=96) and len(study.read()["runs"]) == 3


def test_several_rows_of_one_run_are_kept(study):
    study.module.run = lambda job: [dict(part="a"), dict(part="b")]
    study.measure(dict(task="movie", seed=0))
    assert [(r["task"], r["part"]) for r in study.read()["runs"]] == [("movie", "a"), ("movie", "b")]


def test_a_run_that_fails_leaves_the_file_as_it_was(study):
    study.measure(dict(task="movie", seed=0))
    before = study.path.read_bytes()

    def fails(job):
        raise RuntimeError("out of memory")

    study.module.run = fails
    with pytest.raises(RuntimeError):
        study.measure(dict(task="news", seed=0))
    assert study.path.read_bytes() == before


def test_half_a_line_is_refused_by_name_and_mended_by_the_next_run(study):
    for seed in (0, 1):
        study.append([dict(task="movie", seed=seed)])
    whole = study.path.read_bytes()
    study.path.write_bytes(whole[:-7])
    with pytest.raises(Problem) as caught:
        read_results(study.path)
    assert caught.value.where.row == 2 and caught.value.where.file == study.path
    study.append([dict(task="news", seed=1)])
    assert [(r["task"], r["seed"]) for r in study.read()["runs"]] == [("movie", 0), ("news", 1)]


def test_a_study_goes_on_after_half_a_line(study):
    study.measure(study.missing()[0])
    study.path.write_bytes(study.path.read_bytes() + b'{"task": "ne')
    assert len(study.missing()) == 4


def test_two_writers_take_turns(tmp_path):
    path = tmp_path / "tried.jsonl"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: append(path, [dict(seed=i)], HERE), range(40)))
    results = read_results(path)
    assert sorted(r["seed"] for r in results["runs"]) == list(range(40))
    assert results["machines"] == [HERE]


def test_a_new_machine_gets_the_next_number(tmp_path):
    path = tmp_path / "tried.jsonl"
    other = HERE | dict(cpu="another")
    for here in (HERE, other, HERE):
        append(path, [dict(seed=0)], here)
    results = read_results(path)
    assert [r["machine"] for r in results["runs"]] == [0, 1, 0] and results["machines"] == [HERE, other]


def test_a_summary_is_whole_or_not_there(study, monkeypatch):
    study.module.summarize = lambda results: dict(units=dict(loss="nats"), rows=[dict(task="movie")], empty=[])
    study.summarize()
    path = study.path.with_name("tried_summary.jsonl")
    assert read_results(path) == study.module.summarize(None)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_results(path, dict(rows=[dict(task=object())]))
    assert path.read_bytes() == before


def test_a_summary_that_is_written_elsewhere(study):
    study.module.summarize = lambda results: None
    study.summarize()
    assert not study.path.with_name("tried_summary.jsonl").exists()


def test_who_else_works_is_seen():
    busy = [sys.executable, "-c", "import time\nend = time.time() + 1.5\nwhile time.time() < end: pass"]
    neighbour = subprocess.Popen(busy)
    import time

    _, others = disturbed(lambda: time.sleep(0.8))
    neighbour.terminate()
    neighbour.wait()
    assert others > 0.3
    assert undisturbed(lambda: 1, limit=-1, tries=2, wait=0) is None


def test_a_disturbed_run_is_not_kept(study, monkeypatch):
    study.module.ALONE = 0.05
    monkeypatch.setattr(harness, "undisturbed", lambda *given: None)
    with pytest.raises(Problem) as caught:
        study.measure(dict(task="movie", seed=0))
    assert "disturbed" in caught.value.why and not study.path.exists()


def options(**given):
    usual = dict(only=[], share=(0, 1), most=None, this_machine=False, here=False, tries=1)
    return types.SimpleNamespace(**usual | given)


@pytest.mark.parametrize("most, tries", [(1, harness.TRIES), (8, 1)])
def test_a_disturbed_run_is_made_again_in_a_new_process(study, monkeypatch, most, tries):
    "A process of several runs tries again itself; what else goes wrong is not tried again."
    commands, ends = [], [harness.DISTURBED] * 9
    monkeypatch.setattr(harness, "watched", lambda command, env, reserve: commands.append(command) or ends.pop(0))
    monkeypatch.setattr(harness.time, "sleep", lambda seconds: None)
    with pytest.raises(Problem):
        harness.child(study, options(), most)
    assert len(commands) == tries and f"--tries={harness.TRIES // tries}" in commands[0]
    commands, ends = [], [harness.DISTURBED, 0]
    if most == 1:
        harness.child(study, options(), most)
        assert len(commands) == 2
    commands, ends = [], [1, 0]
    with pytest.raises(Problem):
        harness.child(study, options(), most)
    assert len(commands) == 1


def test_a_process_that_takes_the_last_memory_is_ended(monkeypatch):
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(harness, "free_memory", lambda: 1e9)
    assert harness.watched(sleeps, None, reserve=2e9) < 0
    assert harness.watched([sys.executable, "-c", "raise SystemExit(3)"], None, reserve=1) == 3


def test_a_study_may_say_itself_what_others_took(study):
    study.module.run = lambda job: dict(others=0.25)
    study.measure(dict(task="movie", seed=0))
    assert study.read()["runs"][0]["others"] == 0.25


def asked(*given):
    return harness.parser().parse_args(["run", "tried", *given])


@pytest.mark.parametrize("most", [None, 3])
def test_a_study_goes_on_past_what_fails(study, most, capsys):
    "What fails is tried once, and said at the end; without being told to go on, the first failure ends it."
    works = study.module.run

    def run(job):
        if job["task"] == "news":
            study.module.calls.append(job)
            raise RuntimeError("no news")
        return works(job)

    study.module.run = run
    with pytest.raises(RuntimeError):
        harness.run(study, asked("--here"))
    study.module.calls.clear()
    study.path.unlink()
    with pytest.raises(Problem) as caught:
        harness.run(study, asked("--here", "--go-on", *([f"--most={most}"] if most else [])))
    assert len(study.module.calls) == (most or 5)
    assert [(r["task"], r["seed"]) for r in study.read()["runs"]] == [("movie", 0), ("movie", 1), ("movie", 0)][
        : most and 2
    ]
    assert f"{1 if most else 2} runs" in caught.value.why and "no news" in capsys.readouterr().err


def test_a_process_that_fails_is_followed_by_one_behind_what_failed(study, monkeypatch):
    study.module.PER_PROCESS, behind = 2, []

    def child(study, args, most, after):
        behind.append((most, after))
        jobs = study.missing()[after : after + most]
        if jobs[0] == dict(task="movie", seed=1):
            raise Problem("it fails")
        for job in jobs:
            study.measure(job)

    monkeypatch.setattr(harness, "child", child)
    with pytest.raises(Problem):
        harness.run(study, asked("--go-on"))
    assert behind == [(2, 0), (2, 0), (2, 1)]
    assert [study.key(j) for j in study.missing()] == [study.key(dict(task="movie", seed=1))]


@pytest.mark.parametrize("text", ["2/2", "1", "a/2", "-1/2", ""])
def test_a_share_that_is_none(text):
    with pytest.raises(harness.argparse.ArgumentTypeError):
        share(text)


def bench(*given):
    return subprocess.run([sys.executable, "-m", "nbs.bench", *given], cwd=root, capture_output=True, text=True)


def test_the_command_line_names_what_is_wrong():
    done = bench("run", "curvs")
    assert done.returncode and "curvs" in done.stderr and "curves" in done.stderr and "Traceback" not in done.stderr
    done = bench("rival", "nobody")
    assert done.returncode and "mergekit" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "given, said",
    [
        (["run", "curves", "--only", "whow=x"], "has no 'whow': one of part, how"),
        (["run", "curves", "--only", "how"], "is not field=value"),
        (["run", "curves", "--most", "-1"], "is not a number of runs"),
        (["plan", "curves", "--share", "2/2"], "is not I/N"),
        (["summary", "curves"], "curves has no summary"),
    ],
)
def test_what_cannot_be_asked_for_is_said_before_anything_is_measured(given, said):
    done = bench(*given)
    assert done.returncode and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert "runs to make" not in done.stdout


def test_a_rival_that_is_not_there_says_how_it_is_built(monkeypatch, tmp_path):
    monkeypatch.setenv("FTBOOK_CACHE", str(tmp_path))
    monkeypatch.delenv("FTBOOK_MERGEKIT_PYTHON", raising=False)
    with pytest.raises(Problem) as caught:
        rivals.python_of("mergekit")
    assert caught.value.remedy == "python -m nbs.bench rival mergekit"
    monkeypatch.setenv("FTBOOK_MERGEKIT_PYTHON", sys.executable)
    assert rivals.python_of("mergekit") == sys.executable
    assert rivals.ask("mergekit", "import sys\nprint(sys.argv[1:])", 1, 2).strip() == "['1', '2']"
    assert rivals.ask("mergekit", "import sys\nprint(sys.stdin.read() * 2)", given="ab").strip() == "abab"


@pytest.mark.parametrize("name", harness.studies())
def test_a_study_plans_runs_that_its_key_names(name):
    "Every planned run has all fields of KEY, and no committed run was made more often than it is planned."
    study = Study(name)
    assert study.module.__doc__ and callable(study.module.run)
    planned = [study.key(job) for job in study.module.plan(study.read()["runs"])]
    for job in study.module.plan([]):
        assert set(job) <= set(study.module.KEY)
    assert all(len(json.loads(key)) == len(study.module.KEY) for key in planned)


@pytest.mark.parametrize("path", sorted((nbs / "bench" / "results").glob("*.jsonl")), ids=lambda p: p.stem)
def test_every_run_names_its_machine(path):
    results = read_results(path)
    for row in results.get("runs", []):
        assert "machines" not in results or 0 <= row["machine"] < len(results["machines"])
