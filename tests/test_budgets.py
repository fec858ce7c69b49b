"""Hold the sound of a chapter in numbers: short cells, short functions, a check for every third cell, enough prose.

Blank lines and directives never count. A cell's length is what the page shows. A function's length is that of its body,
and prose is weighed against bodies too: a signature, with its comment for each parameter, and a docstring are prose in code.
"""
import ast, re
from math import ceil
from statistics import median

import pytest

from book import chapters, code_lines, directives, lib, read_cells

modules = chapters()
every_chapter = pytest.mark.parametrize("name, path", modules.items(), ids=modules)
check = re.compile(r"\b(assert|test_\w+\s*\(|expect_fail|allclose|raises|ExceptionExpected)")


def percentile(values, share): return sorted(values)[ceil(share * len(values)) - 1]


def lesson_cells(path):
    "Give the code cells that a reader reads: not the ones that install or only name the module."
    cells = [c for c in read_cells(path, "code") if code_lines(c["source"])]
    return [c for c in cells if directives(c).get("eval", "").lower() != "false"]


def documentation(node):
    "Count the lines of a function or class that document it: what follows its first line up to its body, and its docstring."
    doc = ast.get_docstring(node) is not None
    ends = node.body[0].end_lineno + 1 if doc else node.body[0].lineno
    return max(0, ends - node.lineno - 1)


def working_lines(cell):
    "Count the lines of a code cell that are no documentation. A cell with shell commands counts whole."
    total = len(code_lines(cell["source"]))
    try: tree = ast.parse(cell["source"])
    except SyntaxError: return total
    return total - sum(documentation(o) for o in ast.walk(tree) if isinstance(o, (ast.FunctionDef, ast.ClassDef)))


def function_lengths(name):
    "Measure each function and method of a module: lines of its body."
    text = (lib/f"{name}.py").read_text(encoding="utf-8")
    lines, found = text.split("\n"), {}
    def visit(node, prefix=""):
        for o in ast.iter_child_nodes(node):
            if isinstance(o, ast.ClassDef): visit(o, f"{o.name}.")
            if isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = o.body[1:] if ast.get_docstring(o) is not None else o.body
                found[prefix + o.name] = len(code_lines("\n".join(lines[body[0].lineno - 1:o.end_lineno]))) if body else 0
    visit(ast.parse(text))
    return found


def test_there_are_chapters(): assert modules


@every_chapter
def test_code_cells_are_short(name, path):
    sizes = [len(code_lines(c["source"])) for c in lesson_cells(path)]
    assert median(sizes) <= 6 and percentile(sizes, .9) <= 20, f"median {median(sizes)}, 90th percentile {percentile(sizes, .9)}"


@every_chapter
def test_functions_are_short(name, path):
    sizes = function_lengths(name)
    longest = sorted(sizes.items(), key=lambda o: -o[1])[:5]
    assert median(sizes.values()) <= 8 and percentile(sizes.values(), .9) <= 20, longest


@every_chapter
def test_a_third_of_the_cells_check(name, path):
    cells = lesson_cells(path)
    share = sum(bool(check.search(c["source"])) for c in cells) / len(cells)
    assert share >= 1/3, f"{share:.2f}"


@every_chapter
def test_prose_and_code_are_in_balance(name, path):
    words = sum(len(re.findall(r"\w+", c["source"])) for c in read_cells(path, "markdown"))
    lines = sum(map(working_lines, lesson_cells(path)))
    assert 3 <= words / lines <= 8, f"{words} words, {lines} lines of code"
