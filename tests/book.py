"The book as the house tests see it: notebooks, pages on two shelves, and the modules they write."

import ast, json, re
from pathlib import Path

root = Path(__file__).resolve().parent.parent
nbs, lib = root / "nbs", root / "ftbook"


def notebooks() -> list[Path]:  # Every notebook of the book
    "Find the notebooks, without the folders that tools leave behind."
    return sorted(p for p in nbs.rglob("*.ipynb") if not any(o[0] in "._" for o in p.relative_to(nbs).parts))


def read_cells(
    path: Path,  # A notebook
    kind: str = "",  # "code" or "markdown"; empty for both
) -> list[dict]:  # Its cells, each with its source in one string
    "Read a notebook's cells."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [{**c, "source": "".join(c["source"])} for c in cells if kind in ("", c["cell_type"])]


def directives(
    cell: dict,  # A code cell
) -> dict[str, str]:  # `#| name: value` or `#| name value`, by name
    "Read the directives that stand in a cell."
    return {m[1]: m[2].strip() for m in re.finditer(r"^#\|[ \t]*([\w-]+):?[ \t]*(.*)$", cell["source"], re.M)}


def exported(
    cell: dict,  # A code cell
) -> str | None:  # The module that it writes to; "" for the page's own, None if it writes to none
    "Tell where a cell's code goes."
    found = directives(cell)
    for name in ("export", "exports", "exporti"):
        if name in found:
            return found[name]
    return None


def modules() -> dict[str, Path]:  # Module name, dotted below `ftbook`, to the page that writes it
    "Find every module and its page. AssertionError if two pages write one module."
    found = {}
    for path in notebooks():
        cells = read_cells(path, "code")
        own = [d["default_exp"] for c in cells if "default_exp" in (d := directives(c))]
        names = {exported(c) or own[0] for c in cells if exported(c) is not None}
        for name in names:
            assert name not in found, f"{name} is written by {found.get(name)} and {path}"
            found[name] = path
    return dict(sorted(found.items()))


def lessons() -> list[Path]:  # nbs/01_... to nbs/27_..., in reading order
    "Find the lessons."
    return [p for p in notebooks() if p.parent == nbs and re.match(r"\d\d_", p.name)]


def inside() -> list[Path]:  # nbs/inside/*.ipynb
    "Find the pages about how the library works."
    return [p for p in notebooks() if p.parent.name == "inside"]


def source_of(
    name: str,  # A module, dotted below `ftbook`
) -> Path:  # Its file
    "Find the file of a module."
    return lib / (name.replace(".", "/") + ".py")


def code_lines(
    source: str,  # Python
) -> list[str]:  # Its lines, without blank ones and without directives
    "Keep the lines that a reader reads."
    return [o for o in source.split("\n") if o.strip() and not o.startswith("#|")]


def outside_functions(
    tree: ast.AST,  # A parsed module
) -> list[ast.AST]:  # What runs when the module is imported
    "Walk a module without going into its functions."
    todo, seen = [tree], []
    while todo:
        node = todo.pop()
        seen.append(node)
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            todo += ast.iter_child_nodes(node)
    return seen


def imported(
    nodes,  # AST nodes
    package: str = "ftbook",  # The package that relative imports start from
) -> set[str]:  # Dotted names of the modules they import
    "List what a module's import statements name; `from ftbook import data` counts as ftbook.data."
    found = set()
    for o in nodes:
        if isinstance(o, ast.Import):
            found |= {a.name for a in o.names}
        if isinstance(o, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - o.level] if o.level else []
            module = ".".join([*base, *filter(None, [o.module])])
            whole = (lib.parent / module.replace(".", "/")).is_dir() and module.startswith("ftbook")
            found |= {f"{module}.{a.name}" for a in o.names} if whole else {module}
    return found


def package_of(
    name: str,  # A module, dotted below `ftbook`
) -> str:  # Where its relative imports start
    "Name the package that a module lies in."
    return ".".join(["ftbook", *name.split(".")[:-1]])


def our_imports(
    name: str,  # A module, dotted below `ftbook`
    at_import: bool = False,  # Only what runs when the module is imported
) -> set[str]:  # Modules of ftbook, dotted below `ftbook`
    "List which modules of ftbook a module imports."
    tree = ast.parse(source_of(name).read_text(encoding="utf-8"))
    nodes = outside_functions(tree) if at_import else ast.walk(tree)
    return {o.removeprefix("ftbook.") for o in imported(nodes, package_of(name)) if o.startswith("ftbook.")}
