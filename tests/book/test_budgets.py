"""Hold the size of pages, cells and functions: statements and width, not lines (lines for a lesson's whole).

A docstring is no statement. A page's code lines are those that are neither blank nor directives."""

import ast
import re
from statistics import median

import pytest
from book import (
    code_lines,
    inside,
    lessons,
    modules,
    nbs,
    notebooks,
    read_cells,
    source_of,
)

every_page = pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.relative_to(nbs).as_posix())
every_lesson = pytest.mark.parametrize("path", lessons(), ids=lambda p: p.stem)
every_inside = pytest.mark.parametrize("path", inside(), ids=lambda p: p.stem)
magic = re.compile(r"^( *)[!%].*", re.MULTILINE)


def is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def statements(tree):
    "Count the statements in a piece of code, those inside of functions too."
    return sum(isinstance(o, ast.stmt) and not is_docstring(o) for o in ast.walk(tree))


def width(path):
    return 96 if path.parent == nbs and path.stem[0].isdigit() else 120


def code_of(path):
    return [c["source"] for c in read_cells(path, "code")]


@every_page
def test_lines_are_no_wider_than_the_page(path):
    most = width(path)
    wide = [o for s in code_of(path) for o in s.split("\n") if len(o) > most]
    assert not wide, "\n".join(wide)


@every_page
def test_one_statement_a_line(path):
    crowded = []
    for source in code_of(path):
        tree = ast.parse(magic.sub(r"\1pass", source))
        starts = [o.lineno for o in ast.walk(tree) if isinstance(o, ast.stmt)]
        crowded += [source.split("\n")[n - 1] for n in set(starts) if starts.count(n) > 1]
    assert not crowded, "\n".join(crowded)


@every_lesson
def test_a_lesson_is_short(path):
    lines = sum(len(code_lines(o)) for o in code_of(path))
    assert len(read_cells(path)) <= 80 and lines <= 350, f"{len(read_cells(path))} cells, {lines} lines of code"


@every_inside
def test_an_inside_page_is_short(path):
    assert len(read_cells(path)) <= 120


def is_list(tree):
    "Imports alone, or a dataclass of fields alone: a list has one idea, however long it is."
    body = [o for o in tree.body if not is_docstring(o)]
    if len(body) == 1 and isinstance(body[0], ast.ClassDef):
        return all(isinstance(o, ast.AnnAssign) or is_docstring(o) for o in body[0].body)
    return all(isinstance(o, (ast.Import, ast.ImportFrom)) for o in body)


def cell_sizes(path):
    "Statements of each cell that says anything."
    sizes = [statements(ast.parse(magic.sub(r"\1pass", o))) for o in code_of(path)]
    return [n for n in sizes if n]


@every_lesson
def test_cells_of_a_lesson_are_short(path):
    trees = [ast.parse(magic.sub(r"\1pass", o)) for o in code_of(path)]
    assert max(statements(o) for o in trees if not is_list(o)) <= 20


@every_inside
def test_cells_of_an_inside_page_are_short(path):
    sizes = sorted(cell_sizes(path))
    assert not sizes or sizes[int(0.9 * (len(sizes) - 1))] <= 20, sizes[-5:]


@pytest.mark.parametrize("path", lessons() + inside(), ids=lambda p: p.stem)
def test_the_median_cell_is_short(path):
    sizes = cell_sizes(path)
    assert not sizes or median(sizes) <= 6, sizes


def function_sizes(name):
    "Statements of each function of a module."
    tree = ast.parse(source_of(name).read_text(encoding="utf-8"))
    functions = [o for o in ast.walk(tree) if isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return {o.name: statements(o) - 1 for o in functions}


@pytest.mark.parametrize("name", modules())
def test_functions_are_short(name):
    sizes = function_sizes(name)
    longest = sorted(sizes.items(), key=lambda o: -o[1])[:5]
    assert all(n <= 25 for n in sizes.values()), longest
    assert len(sizes) < 5 or median(sizes.values()) <= 8, longest


def test_the_median_function_is_short():
    assert median(n for name in modules() for n in function_sizes(name).values()) <= 8


@pytest.mark.parametrize("name", modules())
def test_modules_are_short(name):
    assert len(source_of(name).read_text(encoding="utf-8").splitlines()) <= 400
