"Hold what the notebooks, the benches and the scripts take from the library: every name is where they look for it."

import ast, importlib, re
from functools import cache

import pytest

from book import nbs, notebooks, read_cells, root

bench = nbs / "bench"
workers = sorted({*bench.glob("*.py"), *bench.glob("studies/*.py")})
magic = re.compile(r"^(\s*)[!%].*", re.M)
# A word that begins with the library's name and goes on with dots: a module, or a name in one
dotted = re.compile(r"`(ftbook(?:\.\w+)+)")


def code_of(path):
    "A page's or a script's code, as one text."
    if path.suffix == ".py":
        return path.read_text(encoding="utf-8")
    return "\n\n".join(magic.sub(r"\1pass", c["source"]) for c in read_cells(path, "code"))


def parse(text):
    "A tree, or None where a text is no Python."
    try:
        return ast.parse(text)
    except SyntaxError:
        return None


def trees(text):
    "The tree of some code, and those of the programs that it holds as strings."
    tree = ast.parse(text)
    yield tree
    for o in ast.walk(tree):
        if isinstance(o, ast.Constant) and isinstance(o.value, str) and re.search(r"\bimport\b", o.value):
            if (inner := parse(o.value)) is not None:
                yield inner


@cache
def is_module(name):
    "Whether this library has such a module or package; what else may be installed does not count."
    path = root.joinpath(*name.split("."))
    return path.is_dir() or path.with_name(f"{path.name}.py").is_file()


def has(module, name):
    "Whether `from module import name` works."
    return is_module(f"{module}.{name}") or is_module(module) and hasattr(importlib.import_module(module), name)


def resolves(name):
    "Whether a dotted word is a module, or a chain of attributes from one."
    parts = name.split(".")
    n = max((k for k in range(1, len(parts) + 1) if is_module(".".join(parts[:k]))), default=0)
    if not n:
        return False
    found = importlib.import_module(".".join(parts[:n]))
    for part in parts[n:]:
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def within(scope):
    "The nodes of a scope, and the functions that open scopes of their own in it."
    todo, nodes, inner = list(ast.iter_child_nodes(scope)), [], []
    while todo:
        node = todo.pop()
        nodes.append(node)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inner.append(node)
        else:
            todo += ast.iter_child_nodes(node)
    return nodes, inner


def names_of_modules(nodes):
    "{name: the module of ftbook that these nodes import under it}."
    found = {}
    for o in nodes:
        if isinstance(o, ast.Import):
            ours = [a for a in o.names if a.name.split(".")[0] == "ftbook"]
            found |= {a.asname: a.name for a in ours if a.asname} | {"ftbook": "ftbook" for a in ours if not a.asname}
        if isinstance(o, ast.ImportFrom) and (o.module or "").split(".")[0] == "ftbook":
            full = {a.asname or a.name: f"{o.module}.{a.name}" for a in o.names}
            found |= {k: v for k, v in full.items() if is_module(v)}
    return found


def attributes(scope, outer=None):
    "Every (module of ftbook, attribute) that code in a scope names; a local variable hides a module of its name."
    nodes, inner = within(scope)
    local = {o.id for o in nodes if isinstance(o, ast.Name) and isinstance(o.ctx, ast.Store)}
    local |= {o.arg for o in nodes if isinstance(o, ast.arg)}
    here = {k: v for k, v in (outer or {}).items() if k not in local} | names_of_modules(nodes)
    for o in nodes:
        if isinstance(o, ast.Attribute) and isinstance(o.value, ast.Name) and o.value.id in here:
            yield here[o.value.id], o.attr
    for function in inner:
        yield from attributes(function, here)


def unresolved(text):
    "What some code takes from ftbook and would not find there."
    wrong = []
    for tree in trees(text):
        for o in ast.walk(tree):
            if isinstance(o, ast.Import):
                wrong += [a.name for a in o.names if a.name.split(".")[0] == "ftbook" and not is_module(a.name)]
            if isinstance(o, ast.ImportFrom) and (o.module or "").split(".")[0] == "ftbook":
                wrong += [f"{o.module}.{a.name}" for a in o.names if a.name != "*" and not has(o.module, a.name)]
        wrong += [f"{module}.{name}" for module, name in attributes(tree) if not has(module, name)]
    return sorted({*wrong})


def name_of(path):
    return path.relative_to(root).as_posix()


scripts = [*workers, *sorted((root / ".ci").glob("*.py"))]


def test_a_name_that_is_gone_is_found():
    assert unresolved("from ftbook.files import nothing_of_the_kind") == ["ftbook.files.nothing_of_the_kind"]
    assert unresolved("import ftbook.no_such_room") == ["ftbook.no_such_room"]
    assert unresolved("from ftbook.models import load\nload.load_model\nload.gone(1)") == ["ftbook.models.load.gone"]
    assert unresolved("program = 'from ftbook.lora import LoRA'") == ["ftbook.lora.LoRA"]
    inside = "def f():\n    from ftbook.models import load\n    return load.gone\ndef g(load):\n    return load.fine"
    assert unresolved(inside) == ["ftbook.models.load.gone"]
    assert unresolved("import ftbook as ft\nft.finetune\nft.gone") == ["ftbook.gone"]


@pytest.mark.parametrize("path", notebooks() + scripts, ids=name_of)
def test_what_is_taken_from_the_library_is_there(path):
    assert not unresolved(code_of(path))


@pytest.mark.parametrize("path", notebooks() + scripts, ids=name_of)
def test_what_is_said_of_the_library_is_there(path):
    "A dotted name between backticks, in prose, docstrings and comments."
    text = code_of(path)
    if path.suffix == ".ipynb":
        text += "\n".join(c["source"] for c in read_cells(path, "markdown"))
    assert not sorted({o for o in dotted.findall(text) if not resolves(o)})


@pytest.mark.parametrize("path", notebooks() + scripts, ids=name_of)
def test_pages_are_called_by_their_titles(path):
    text = path.read_text(encoding="utf-8")
    assert not [text[max(0, m.start() - 40) : m.end() + 20] for m in re.finditer(r"\b[Cc]hapter \d", text)]


def module_of(path):
    "The name under which a page or a study imports a script of the bench."
    return ".".join(path.relative_to(bench).with_suffix("").parts)


def taken_from_each_other(path):
    "(module, name) of every `from studies.x import name` in a script or a page of the bench."
    here = {module_of(p) for p in workers}
    for o in ast.walk(ast.parse(code_of(path))):
        if isinstance(o, ast.ImportFrom) and o.module in here:
            yield from ((o.module, a.name) for a in o.names)


def defined(path):
    "Names at the top of a script."
    found = set()
    for o in ast.walk(ast.Module(ast.parse(code_of(path)).body, [])):
        if isinstance(o, (ast.FunctionDef, ast.ClassDef)):
            found.add(o.name)
        if isinstance(o, ast.Name) and isinstance(o.ctx, ast.Store):
            found.add(o.id)
        if isinstance(o, (ast.Import, ast.ImportFrom)):
            found |= {(a.asname or a.name).split(".")[0] for a in o.names}
    return found


@pytest.mark.parametrize("path", workers + sorted(bench.glob("*.ipynb")), ids=name_of)
def test_what_a_bench_takes_from_another_is_there(path):
    there = cache(lambda name: defined(bench / f"{name.replace('.', '/')}.py"))
    assert not [f"{module}.{name}" for module, name in taken_from_each_other(path) if name not in there(module)]


def test_the_methods_of_the_bench_are_found(monkeypatch):
    monkeypatch.syspath_prepend(str(bench))
    methods = importlib.import_module("studies.methods")
    named = {tuple(v[:2]) for v in methods.VARIANTS.values() if v is not None}
    assert len(named) > 5 and not [f"ftbook.methods.{m}.{n}" for m, n in named if not has(f"ftbook.methods.{m}", n)]


@pytest.mark.parametrize("path", sorted(bench.glob("*.ipynb")), ids=name_of)
def test_a_page_of_the_bench_opens_with_its_answer(path):
    "The first heading is the answer, and the first thing that a cell shows stands below it, before the next heading."
    kinds = []
    for cell in read_cells(path):
        if cell["cell_type"] == "markdown":
            kinds += re.findall(r"^## .+", cell["source"], re.M)
        elif any("text/html" in o.get("data", {}) or "text/markdown" in o.get("data", {}) for o in cell["outputs"]):
            kinds.append("shown")
    assert kinds[:2] == ["## The answer", "shown"]
