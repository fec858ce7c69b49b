"The book as the house tests see it: notebooks, chapters in reading order, and the modules they write."
import ast, json, re
from pathlib import Path

root = Path(__file__).resolve().parent.parent
nbs, lib = root/"nbs", root/"ftbook"


def notebooks() -> list[Path]: # Every notebook of the book
    "Find the notebooks, without the folders that tools leave behind."
    return sorted(p for p in nbs.rglob("*.ipynb") if not any(o[0] in "._" for o in p.relative_to(nbs).parts))


def read_cells(
    path: Path, # A notebook
    kind: str = "", # "code" or "markdown"; empty for both
) -> list[dict]: # Its cells, each with its source in one string
    "Read a notebook's cells."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [{**c, "source": "".join(c["source"])} for c in cells if kind in ("", c["cell_type"])]


def directives(
    cell: dict, # A code cell
) -> dict[str, str]: # `#| name: value` or `#| name value`, by name
    "Read the directives that stand in a cell."
    return {m[1]: m[2].strip() for m in re.finditer(r"^#\|[ \t]*([\w-]+):?[ \t]*(.*)$", cell["source"], re.M)}


def chapters() -> dict[str, Path]: # Module name to notebook, in reading order
    "Find the numbered notebooks that write a module."
    found = {}
    for path in notebooks():
        names = [d["default_exp"] for c in read_cells(path, "code") if "default_exp" in (d := directives(c))]
        if names and re.match(r"\d", path.name): found[names[0]] = path
    return found


def code_lines(
    source: str, # Python
) -> list[str]: # Its lines, without blank ones and without directives
    "Keep the lines that a reader reads."
    return [o for o in source.split("\n") if o.strip() and not o.startswith("#|")]


def outside_functions(
    tree: ast.AST, # A parsed module
) -> list[ast.AST]: # What runs when the module is imported
    "Walk a module without going into its functions."
    todo, seen = [tree], []
    while todo:
        node = todo.pop()
        seen.append(node)
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)): todo += ast.iter_child_nodes(node)
    return seen


def imported(
    nodes, # AST nodes
) -> set[str]: # Dotted names of the modules they import
    "List what a module's import statements name; `from ftbook import data` counts as ftbook.data."
    found = set()
    for o in nodes:
        if isinstance(o, ast.Import): found |= {a.name for a in o.names}
        if isinstance(o, ast.ImportFrom):
            module = ".".join(filter(None, ["ftbook" * bool(o.level), o.module])) # nbdev-export writes `from .data import` for `from ftbook.data import`
            found |= {f"ftbook.{a.name}" for a in o.names} if module == "ftbook" else {module}
    return found
