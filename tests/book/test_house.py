"Hold the house: packaging, the arrows between modules, light imports, documentation, clean notebooks."

import ast, configparser, importlib, importlib.metadata, inspect, re, shutil, subprocess, sys, tomllib
from pathlib import Path

import pytest, yaml
from fastcore.docments import docments
from packaging.requirements import Requirement
from packaging.version import Version

import ftbook
from book import (
    directives,
    imported,
    inside,
    lessons,
    lib,
    modules,
    nbs,
    notebooks,
    our_imports,
    package_of,
    outside_functions,
    read_cells,
    root,
    source_of,
)

pages = modules()
order = list(pages)
every_module = pytest.mark.parametrize("name", order)
every_notebook = pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.relative_to(nbs).as_posix())
# One set of versions known to work together. A requirement must be in it, and its range must admit it.
known_good = dict(
    line.strip().split("==") for line in (root / "constraints.txt").read_text().splitlines() if "==" in line
)
# What a module may not import when it is itself imported: optional, or slow.
heavy = {
    "transformers",
    "peft",
    "datasets",
    "accelerate",
    "matplotlib",
    "ipywidgets",
    "pandas",
    "bitsandbytes",
    "setfit",
    "sentence_transformers",
    "trl",
    "mergekit",
    "sklearn",
    "scipy",
    "ftfy",
    "py3langid",
    "phonenumbers",
    "IPython",
    "gguf",
}
optional = ["peft", "bitsandbytes", "setfit", "matplotlib"]


def settings() -> configparser.ConfigParser:
    "Read settings.ini as setup.py does."
    cfg = configparser.ConfigParser(delimiters=["="], interpolation=None)
    cfg.read(root / "settings.ini", encoding="utf-8")
    return cfg


def requirements() -> list[str]:
    "List every requirement in settings.ini, core and extras."
    cfg = settings()
    values = [cfg["metadata"]["requirements"], *cfg["extras"].values()]
    return [o.strip() for v in values for o in v.split("\n") if o.strip()]


def run_python(code: str) -> subprocess.CompletedProcess:
    "Run Python code in a process of its own."
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)


def test_the_book_is_there():
    assert len(order) >= 50 and len(notebooks()) > len(lessons()) + len(inside())
    written = {
        ".".join(p.relative_to(lib).with_suffix("").parts) for p in lib.rglob("*.py") if not p.name.startswith("_")
    }
    assert written == set(order), "each module has one page, and each page its module: run nbdev-export"


def test_lessons_are_numbered_without_a_gap():
    numbers = [int(p.name[:2]) for p in lessons()]
    assert numbers == list(range(1, len(numbers) + 1))


# Packaging


def test_one_version_and_one_description():
    project, meta = tomllib.loads((root / "pyproject.toml").read_text())["project"], settings()["metadata"]
    assert ftbook.__version__ == importlib.metadata.version("ftbook")
    assert (project["name"], project["description"]) == (meta["lib_name"], meta["description"])
    assert project["urls"] == {"Repository": meta["git_url"], "Documentation": meta["doc_url"]}
    assert "version" in project["dynamic"] and "version" not in meta


@pytest.mark.parametrize("line", requirements())
def test_ranges_admit_the_known_good_set(line):
    req = Requirement(line)
    if req.name == "ftbook":
        assert req.extras <= set(settings()["extras"])
    else:
        assert req.name in known_good, "put the version you tested into constraints.txt"
        assert Version(known_good[req.name]) in req.specifier
        assert not any(s.operator in ("==", "===") for s in req.specifier), "a range, not a pin"


def test_import_is_light():
    code = (
        "import sys, time; t = time.perf_counter(); import ftbook; print(time.perf_counter() - t); print(*sys.modules)"
    )
    runs = [run_python(code) for _ in range(3)]
    assert all(r.returncode == 0 for r in runs), runs[0].stderr
    seconds, names = zip(*(r.stdout.split("\n")[:2] for r in runs))
    assert min(map(float, seconds)) < 0.3
    assert not {"torch", "transformers", *heavy} & set(names[0].split())


def test_modules_need_nothing_optional_and_nothing_slow():
    "One process imports them all, one after the other, and says which brought what it should not."
    code = f"""
import importlib, sys
for name in {optional}:
    sys.modules[name] = None
slow = {heavy - set(optional) - {"IPython"}}
for name in {order}:
    importlib.import_module('ftbook.' + name)
    if found := slow & set(sys.modules):
        print(name, 'imports', *sorted(found))
        slow -= found
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not done.stdout, done.stdout


# Arrows

# Each package leans on those of the rows above its own, and on no other.
floors = [
    ["problem"],
    ["colab", "files", "ghost", "house", "keys", "results"],
    ["show"],
    ["models"],
    ["data"],
    ["quality", "methods", "training"],
    ["memory", "scale", "fewshot", "forgetting", "merging"],
    ["recipe"],
    ["use"],
    ["choose"],
    ["commands"],
    ["cli"],
]
floor = {name: n for n, row in enumerate(floors) for name in row}


@every_module
def test_arrows_point_down(name):
    package = name.split(".")[0]
    up = {o for o in our_imports(name) if (p := o.split(".")[0]) != package and floor[p] >= floor[package]}
    assert not up, f"{name} leans on {sorted(up)}, which is not below it"


def test_the_plan_for_maintainers_has_these_floors():
    text = "\n".join(c["source"] for c in read_cells(nbs / "inside/index.ipynb", "markdown"))
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", text, re.M)
    assert [int(n) for n, _ in rows] == list(range(len(floors)))
    assert [re.findall(r"`(\w+)`", names) for _, names in rows] == floors


def test_the_plan_for_maintainers_is_drawn_from_the_modules_that_there_are():
    "The saved page names every module, and draws every package."
    cells = read_cells(nbs / "inside/index.ipynb", "code")
    data = [o.get("data", {}) for c in cells for o in c["outputs"]]
    table = "".join("".join(o.get("text/markdown", "")) for o in data)
    assert re.findall(r"^\| `([\w.]+)`", table, re.M) and set(re.findall(r"^\| `([\w.]+)`", table, re.M)) == set(order)


def test_no_module_leans_on_itself():
    graph = {name: our_imports(name) for name in order}
    seen, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join(path[path.index(name) :] + [name])
        if name in seen:
            return
        seen.add(name)
        path.append(name)
        for other in sorted(graph.get(name, ())):
            visit(other)
        path.pop()

    for name in order:
        visit(name)


def foreign_names(tree):
    "Names that a module has from another module of the house."
    return {
        a.asname or a.name
        for o in ast.walk(tree)
        if isinstance(o, ast.ImportFrom) and (o.level or (o.module or "").startswith("ftbook"))
        for a in o.names
    }


@every_module
def test_no_module_patches_another(name):
    tree = ast.parse(source_of(name).read_text(encoding="utf-8"))
    theirs, wrong = foreign_names(tree), []
    for o in ast.walk(tree):
        targets = (
            o.targets
            if isinstance(o, ast.Assign)
            else [o.target]
            if isinstance(o, (ast.AugAssign, ast.AnnAssign))
            else []
        )
        wrong += [
            f"line {o.lineno}: an attribute of {t.value.id} is set"
            for t in targets
            if isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name) and t.value.id in theirs
        ]
        if isinstance(o, ast.FunctionDef) and any(
            isinstance(d, ast.Name) and d.id == "patch" for d in o.decorator_list
        ):
            kind = o.args.args[0].annotation
            if isinstance(kind, ast.Name) and kind.id in theirs:
                wrong.append(f"line {o.lineno}: {o.name} is patched onto {kind.id}")
        if (
            isinstance(o, ast.Call)
            and isinstance(o.func, ast.Name)
            and o.func.id == "setattr"
            and isinstance(o.args[0], ast.Name)
            and o.args[0].id in theirs
        ):
            wrong.append(f"line {o.lineno}: setattr on {o.args[0].id}")
    assert not wrong, "\n".join(wrong)


@every_module
def test_no_heavy_import_at_the_top(name):
    tree = ast.parse((source_of(name)).read_text(encoding="utf-8"))
    assert not {o.split(".")[0] for o in imported(outside_functions(tree), package_of(name))} & heavy


@every_module
def test_what_a_module_imports_is_required(name):
    called = {"pyyaml": "yaml", "scikit-learn": "sklearn"}
    given = lambda text: {
        called.get(n := Requirement(o).name, n.replace("-", "_")) for o in text.split("\n") if o.strip()
    }
    core = given(settings()["metadata"]["requirements"]) | sys.stdlib_module_names | {"ftbook"}
    tree = ast.parse((source_of(name)).read_text(encoding="utf-8"))
    assert {o.split(".")[0] for o in imported(outside_functions(tree), package_of(name))} <= core, (
        "add it to requirements in settings.ini"
    )
    anywhere = core.union({"IPython"}, *map(given, settings()["extras"].values()))
    assert {o.split(".")[0] for o in imported(ast.walk(tree), package_of(name))} <= anywhere, (
        "add it to an extra in settings.ini"
    )


@every_module
def test_no_careless_code(name):
    text = (source_of(name)).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: a bare except"
            broad = isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
            assert not (broad and all(isinstance(o, ast.Pass) for o in node.body)), (
                f"line {node.lineno}: an error is swallowed"
            )
    assert not re.search(r"\b(TODO|FIXME|XXX)\b|trust_remote_code\s*=\s*True|^\s*(import|from) pickle\b", text, re.M)


# Documentation


def public_things(name):
    "Give the public functions, classes and methods that a module defines."
    module = importlib.import_module(f"ftbook.{name}")
    for label in module.__all__:
        o = inspect.unwrap(getattr(module, label))
        if getattr(o, "__module__", None) != module.__name__ or not (inspect.isfunction(o) or inspect.isclass(o)):
            continue
        yield label, o
        if inspect.isclass(o):
            yield from (
                (f"{label}.{k}", v)
                for k, v in vars(o).items()
                if k[0] != "_" and inspect.isfunction(v) and v.__module__ == module.__name__
            )


@every_module
def test_every_public_name_is_documented(name):
    missing = []
    for label, o in public_things(name):
        if not (o.__doc__ or "").strip() or o.__doc__.startswith(f"{label}("):
            missing.append(f"{label}: a docstring")
        elif o.__doc__.strip().split("\n\n")[0].count("\n") > 2:
            missing.append(f"{label}: the docstring's first paragraph is more than three lines")
        if inspect.isclass(o) and o.__init__ is object.__init__:
            continue
        notes = docments(o, returns=False, args_kwargs=True)
        missing += [
            f"{label}: a comment for `{p}`"
            for p, note in notes.items()
            if p not in ("self", "cls", "return") and not note
        ]
    assert not missing, "\n".join(missing)


def test_few_names_are_public():
    names = [label for name in order for label in importlib.import_module(f"ftbook.{name}").__all__]
    assert len(names) <= 180 and len(names) == len(set(names))


# Notebooks


def copy_of_the_book(to: Path) -> Path:
    "Copy what nbdev needs, without version control and without builds."
    for folder in ("nbs", "ftbook"):
        shutil.copytree(root / folder, to / folder, ignore=shutil.ignore_patterns("__pycache__", ".*", "runs"))
    for file in ("pyproject.toml", "_quarto.yml", "README.md"):
        shutil.copy(root / file, to / file)
    return to


@pytest.mark.parametrize("command", ["nbdev-export", "nbdev-clean"])
def test_running_it_again_changes_nothing(command, tmp_path):
    copy = copy_of_the_book(tmp_path)
    read = lambda: {
        p.relative_to(copy): p.read_bytes()
        for d in ("nbs", "ftbook")
        for p in (copy / d).rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    before = read()
    subprocess.run([command], cwd=copy, check=True, capture_output=True)
    after = read()
    assert sorted(p.as_posix() for p in before.keys() | after.keys() if before.get(p) != after.get(p)) == []


def test_readme_is_fresh():
    done = subprocess.run([sys.executable, root / ".ci/readme.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_sidebar_lists_every_page():
    def files(o):
        if isinstance(o, str):
            return [o]
        return [f for part in (o.get("contents", []) if isinstance(o, dict) else o) for f in files(part)]

    listed = files(yaml.safe_load((root / "_quarto.yml").read_text())["website"]["sidebar"]["contents"])
    assert sorted(listed) == [p.relative_to(nbs).as_posix() for p in notebooks()]
    assert (nbs / "_quarto.yml").read_bytes() == (root / "_quarto.yml").read_bytes()


here = re.compile(
    r"(?<![\w.])/(root|home|tmp|work|opt|mnt|Users|var/folders)/|[A-Z]:\\\\Users|site-packages|\bat 0x[0-9a-f]{6,}"
)


@every_notebook
def test_no_path_of_the_machine_that_ran_it(path):
    text = path.read_text(encoding="utf-8")
    assert not [text[max(0, m.start() - 60) : m.end() + 60] for m in here.finditer(text)]


@every_notebook
def test_outputs_are_fit_to_print(path):
    for cell in read_cells(path, "code"):
        bad = [o for o in cell["outputs"] if o["output_type"] == "error" or o.get("name") == "stderr"]
        assert not bad, f"stored error or warning under\n{cell['source']}"


@every_notebook
def test_imports_are_spelled_out(path):
    for cell in read_cells(path, "code"):
        assert not re.search(r"^\s*from \.", cell["source"], re.M), (
            "write `from ftbook.x import y`: a notebook is in no package"
        )
        star = re.findall(r"^\s*from (\S+) import \*", cell["source"], re.M)
        assert set(star) <= {"fastcore.test"}, f"say what comes from {star}"


@every_notebook
def test_imports_have_cells_of_their_own(path):
    for cell in read_cells(path, "code"):
        found = directives(cell)
        if (
            {"export", "exports", "exporti"} & found.keys()
            or found.get("eval", "").lower() == "false"
            or "%" in cell["source"][:2]
        ):
            continue
        body = ast.parse(re.sub(r"^[!%].*", "", cell["source"], flags=re.M)).body
        if not any(isinstance(o, (ast.Import, ast.ImportFrom)) for top in body for o in ast.walk(top)):
            continue
        harmless = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
        assert all(isinstance(o, harmless) for o in body), (
            f"building the site runs each cell that imports, so it can do nothing else:\n{cell['source']}"
        )


@pytest.mark.parametrize("path", lessons(), ids=lambda p: p.stem)
def test_the_front_page_lists_every_lesson(path):
    title = re.match(r"# (.+)", read_cells(path)[0]["source"])[1]
    assert f"[{title}]({path.name})" in "\n".join(c["source"] for c in read_cells(nbs / "index.ipynb"))


skipping = {"cuda", "slow", "net", "notest", "skip_exec"}


@every_notebook
def test_no_cell_is_skipped_without_a_reason(path):
    front = (
        read_cells(path)[0]["source"] + read_cells(path, "raw")[0]["source"]
        if read_cells(path, "raw")
        else read_cells(path)[0]["source"]
    )
    assert "skip_exec" not in front, "flag the cells that cannot run, and say why beside each"
    for cell in read_cells(path, "code"):
        found = directives(cell)
        if skipping & found.keys() or found.get("eval", "").lower() == "false":
            assert re.search(r"^# .*\w", cell["source"], re.M), f"why is this cell skipped?\n{cell['source']}"


def test_a_folder_left_out_of_the_tests_says_why():
    assert all(p.read_text().strip() for p in nbs.rglob(".notest"))


@every_notebook
def test_links_lead_somewhere(path):
    for cell in read_cells(path, "markdown"):
        for target in re.findall(r"\]\((?![a-z]+:|#)([^)\s#]+)", cell["source"]):
            assert (path.parent / target).exists(), f"{target} is not there"


@every_notebook
def test_plain_words(path):
    for cell in read_cells(path):
        assert not re.search("[\u2014\U0001f300-\U0001faff\u2600-\u27bf]", cell["source"]), (
            f"a dash or an emoji in\n{cell['source']}"
        )


@pytest.mark.parametrize("path", lessons() + inside(), ids=lambda p: p.stem)
def test_a_page_opens_as_all_do(path):
    first, badge, install = read_cells(path)[:3]
    assert re.fullmatch(r"# [^\n]+\n+> [^\n]+\n*", first["source"]), "a title and a one-line subtitle, alone"
    where = path.relative_to(nbs).as_posix()
    assert f"colab.research.google.com/github/ftbook/ftbook/blob/main/nbs/{where}" in badge["source"]
    assert "pip install" in install["source"] and {"hide", "eval"} <= directives(install).keys()
