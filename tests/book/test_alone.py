"Hold what makes a notebook run alone: one setup cell in all of them, and cells that skip what is not there."

import ast, configparser, importlib.util, json, re, shutil, sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from types import ModuleType

import nbformat, pytest
from IPython.core.inputtransformer2 import TransformerManager
from packaging.requirements import Requirement

import ftbook.colab
from book import directives, modules, nbs, notebooks, read_cells, root

home = nbs / "inside/colab.ipynb"
setup = read_cells(home, "code")[0]["source"]
running = [p for p in notebooks() if p != nbs / "index.ipynb"]
every_page = pytest.mark.parametrize("path", running, ids=lambda p: p.relative_to(nbs).as_posix())
magic = re.compile(r"^( *)[!%].*", re.M)


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, root / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The setup cell


@every_page
def test_every_notebook_begins_with_the_setup_cell(path):
    title, badge, cell = read_cells(path)[:3]
    page = path.relative_to(nbs).as_posix()
    assert title["source"].startswith("# ") and badge["source"] == load_script("setup_cell").BADGE.format(page=page)
    assert cell["cell_type"] == "code" and cell["source"] == setup, "run `python .ci/setup_cell.py`"
    assert not [c for c in read_cells(path, "code")[1:] if "pip install -Uqq" in c["source"]]


def test_the_front_page_runs_nothing():
    assert not read_cells(nbs / "index.ipynb", "code"), "then it needs the setup cell, and the badge"


def test_the_page_of_the_cell_shows_it():
    shown = setup.split("\n", 3)[3]
    assert any(f"```python\n{shown}\n```" in c["source"] for c in read_cells(home, "markdown"))


class Shell:
    "What the setup cell asks of Jupyter."

    def __init__(self):
        self.asked = []

    def run_line_magic(self, name, line):
        self.asked.append((name, line))


def run_setup(monkeypatch):
    "Run the cell: what it asked of Jupyter, and how often it brought the bench."
    shell, brought = Shell(), []
    monkeypatch.setattr(ftbook.colab, "bring_bench", lambda: brought.append(1))
    names = dict(get_ipython=lambda: shell)
    exec(TransformerManager().transform_cell(setup), names)
    return [(name, re.sub(r"\{(\w+)\}", lambda m: names[m[1]], line)) for name, line in shell.asked], len(brought)


def test_elsewhere_the_setup_cell_does_nothing(monkeypatch):
    monkeypatch.delenv("FTBOOK_COLAB", raising=False)
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    before = set(sys.modules)
    assert run_setup(monkeypatch) == ([], 0)
    assert set(sys.modules) == before


def test_on_colab_it_installs_what_is_published(monkeypatch):
    monkeypatch.delenv("FTBOOK_COLAB", raising=False)
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    asked, brought = run_setup(monkeypatch)
    address = "git+" + ftbook.colab.REPOSITORY
    assert asked == [("pip", f'install -Uqq "ftbook[notebooks] @ {address}"')] and brought == 1
    config = configparser.ConfigParser(delimiters=["="], interpolation=None)
    config.read(root / "settings.ini", encoding="utf-8")
    assert ftbook.colab.REPOSITORY == config["metadata"]["git_url"]


def test_an_imitation_says_what_is_installed(monkeypatch):
    monkeypatch.setenv("FTBOOK_COLAB", "file:///x.whl")
    asked, brought = run_setup(monkeypatch)
    assert asked == [("pip", 'install -Uqq "ftbook[notebooks] @ file:///x.whl"')] and brought == 1


def test_the_script_puts_cell_and_badge_in_their_place():
    begin = load_script("setup_cell").begin
    title = dict(cell_type="markdown", id="a", source=["# Title"])
    badge = dict(cell_type="markdown", id="b", source=["[![Open in Colab](x/colab-badge.svg)](y)"])
    old = dict(cell_type="code", id="c", source=['! pip install -Uqq "ftbook[notebooks] @ x"'])
    work = dict(cell_type="code", id="d", source=["x = 1"])
    for cells, kept in (([title, badge, old, work], "bc"), ([title, badge, work], "b"), ([title, work], "")):
        made = begin(cells, "bench/x.ipynb", ["new"])
        assert [c["cell_type"] for c in made] == ["markdown", "markdown", "code", "code"]
        assert made[2]["source"] == ["new"] and made[3] == work
        assert [c["id"] for c in made if c["id"] in "bc"] == list(kept)
        assert begin(made, "bench/x.ipynb", ["new"])[1]["source"][0].endswith("nbs/bench/x.ipynb)")
    assert len(begin(begin([title, work], "p", setup.splitlines(True)), "p", setup.splitlines(True))) == 4


# Cells that need a GPU

on_gpu = [(p, c["source"]) for p in running for c in read_cells(p, "code") if "cuda" in directives(c)]


def test_there_are_cells_for_a_gpu():
    assert len(on_gpu) >= 3


@pytest.mark.parametrize("path, source", on_gpu, ids=lambda o: o.name if hasattr(o, "name") else "")
def test_a_cell_for_a_gpu_skips_itself(path, source, monkeypatch, capsys):
    "It runs through without a device, with nothing of its page but PyTorch and the folder, and says that it did."
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    exec(source, dict(torch=torch, Path=Path))
    said = capsys.readouterr().out
    assert re.fullmatch(r"skipped: [^\n]+\n", said)


# What a notebook needs is installed with it


def closure(name, extras=()):
    "Names of the packages that one brings with it, by the metadata of what is installed here."
    found, todo = set(), [(name, frozenset(extras))]
    while todo:
        one = todo.pop()
        if one in found:
            continue
        found.add(one)
        try:
            lines = requires(one[0]) or []
        except PackageNotFoundError:
            continue
        for line in lines:
            req = Requirement(line)
            if any(not req.marker or req.marker.evaluate(dict(extra=e)) for e in one[1] or {""}):
                todo.append((req.name.lower().replace("_", "-"), frozenset(req.extras)))
    return {o[0] for o in found}


def of_extra(extra):
    "What the library and one of its extras bring, as settings.ini has it."
    config = configparser.ConfigParser(delimiters=["="], interpolation=None)
    config.read(root / "settings.ini", encoding="utf-8")
    lines = config["metadata"]["requirements"] + config["extras"][extra]
    wanted = [Requirement(o) for o in lines.split("\n") if o.strip() and not o.startswith("#")]
    return set().union(*(closure(r.name.lower().replace("_", "-"), r.extras) for r in wanted))


def imports(tree):
    "First words of all modules that some code imports."
    for o in ast.walk(tree):
        if isinstance(o, ast.Import):
            yield from (a.name.split(".")[0] for a in o.names)
        if isinstance(o, ast.ImportFrom) and not o.level:
            yield o.module.split(".")[0]


brought = of_extra("notebooks")
homes = packages_distributions()
# Asked for only by functions that their page explains and does not call
optional = {"inside/harness.ipynb": {"lm_eval"}, "inside/house.ipynb": {"nbdev"}}
beside = {"google"} | {p.stem for p in (nbs / "bench").rglob("*.py")} | {p.name for p in (nbs / "bench").iterdir()}


@every_page
def test_the_extra_brings_what_a_notebook_imports(path):
    missing = set()
    for c in read_cells(path, "code"):
        found = directives(c)
        if "default_exp" in found or found.get("eval", "").lower() == "false":
            continue
        for name in imports(ast.parse(magic.sub(r"\1pass", c["source"]))):
            known = name in sys.stdlib_module_names or name in beside or name == "ftbook"
            if not known and not {o.lower().replace("_", "-") for o in homes.get(name, [])} & brought:
                missing.add(name)
    assert missing <= optional.get(path.relative_to(nbs).as_posix(), set()), (
        "add it to the extra `notebooks` in settings.ini"
    )


# The imitation


@pytest.fixture
def imitation(tmp_path, monkeypatch):
    "The script that imitates Colab, with this interpreter as its kernel and a folder of its own for notebooks."
    script = load_script("colab")
    monkeypatch.setenv("JUPYTER_PATH", "")
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.setattr(script, "nbs", tmp_path / "nbs")
    script.add_kernel(tmp_path / "jupyter", Path(sys.executable), tmp_path / "ftbook.whl")
    (tmp_path / "nbs").mkdir()
    return script


def write_page(script, name, *sources):
    cells = [nbformat.v4.new_code_cell(o) for o in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), script.nbs / name)


def test_the_imitation_runs_a_page_alone_and_names_the_cell_that_failed(imitation, tmp_path, monkeypatch):
    alone = """import os, pathlib
assert not list(pathlib.Path('.').iterdir()) and not list(pathlib.Path('..').glob('bench'))
assert os.environ['FTBOOK_COLAB'].endswith('ftbook.whl') and 'PYTHONPATH' not in os.environ"""
    write_page(imitation, "a.ipynb", alone, "#| slow\nraise ValueError('hours')")
    write_page(imitation, "b.ipynb", "x = 1", "raise ValueError('not here')", "raise KeyError")
    log = tmp_path / "log.jsonl"
    a, b = imitation.run_pages(["a.ipynb", "b.ipynb"], log)
    assert a["passed"] and a["seconds"] > 0, a
    assert (b["passed"], b["cell"], b["said"]) == (False, 1, "ValueError: not here")
    assert "cell 1: ValueError: not here" in imitation.line(b)
    monkeypatch.setattr(imitation, "run_page", lambda page: dict(page=page, passed=True, seconds=0))
    assert imitation.run_pages(["a.ipynb", "b.ipynb"], log) == [a, dict(page="b.ipynb", passed=True, seconds=0)]
    assert [json.loads(o)["page"] for o in log.read_text().splitlines()] == ["a.ipynb", "b.ipynb", "b.ipynb"]


def test_the_imitation_knows_every_notebook():
    script = load_script("colab")
    assert script.pages() == sorted(p.relative_to(nbs).as_posix() for p in running)
    lesson, inside, bench = script.CHOSEN
    assert {lesson, inside, bench} <= {*script.pages()}
    for page, reads in (lesson, "bench/results/"), (inside, "../bench/results/"):
        assert reads in "".join(c["source"] for c in read_cells(nbs / page, "code"))
    assert inside.startswith("inside/") and bench.startswith("bench/")


def test_an_environment_with_another_ftbook_is_refused(tmp_path):
    script = load_script("colab")
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\necho /elsewhere/ftbook/__init__.py\n")
    python.chmod(0o755)
    with pytest.raises(SystemExit, match="/elsewhere/ftbook"):
        script.check_environment(python)
    python.write_text(f"#!/bin/sh\necho {tmp_path}/lib/ftbook/__init__.py\n")
    script.check_environment(python)


def test_the_wheel_is_built_from_a_copy(tmp_path, monkeypatch):
    "The copy has all that the package has, and no old build, which pip would take along."
    script, seen = load_script("colab"), set()
    monkeypatch.setattr(script, "root", shutil.copytree(root, tmp_path / "book", ignore=shutil.ignore_patterns(".git")))
    old = script.root / "build/lib/ftbook/gone.py"
    old.parent.mkdir(parents=True, exist_ok=True)
    old.write_text("x = 1")

    def pip(python, *words):
        seen.update(p.relative_to(words[-1]).as_posix() for p in Path(words[-1]).rglob("*") if p.is_file())
        (tmp_path / "ftbook-0.whl").touch()

    monkeypatch.setattr(script, "pip", pip)
    assert script.build_wheel(tmp_path) == tmp_path / "ftbook-0.whl"
    package = [p for p in (root / "ftbook").rglob("*") if p.is_file() and p.suffix != ".pyc"]
    assert {p.relative_to(root).as_posix() for p in package} <= seen
    assert {"setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE"} <= seen
    assert not [o for o in seen if o.startswith("build/")]
