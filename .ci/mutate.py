"""Does a check fail when a public function gives something else?

    python .ci/mutate.py normalise pack Loop.take_step      # or --all; CI does not run it

For each name the function is changed in a copy of the book, in its module and on its page: its result is another one (a
number more, an item less, the opposite, nothing), or, where it works in place, it does nothing. Then the pages and the files
of tests that `tests/called.py` finds to check it run, the page that defines it first, until one fails. A name that none
fails for is a survivor: put an assertion where it would have been noticed. Exit status 1 if there is one.
"""

import argparse, ast, inspect, json, os, shutil, subprocess, sys, tempfile, textwrap, time
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root), str(root / "tests")]

CHANGED = '''
def _other(o):
    import functools
    name = type(o).__name__
    if name in ('Tensor', 'Parameter', 'ndarray') or hasattr(o, 'dtype') and hasattr(o, 'shape'):
        return ~o if 'bool' in str(o.dtype) else o + 1
    if isinstance(o, bool):
        return not o
    if isinstance(o, (int, float)):
        return o + 1
    if isinstance(o, str):
        return o + '?'
    if isinstance(o, (list, tuple)) and type(o) in (list, tuple):
        return o[:-1] if o else type(o)([None])
    if type(o) in (dict, set):
        return type(o)(list(o.items() if type(o) is dict else o)[:-1] or [('?', 0)])
    return None if o is not None else 'something'


def _mutate(f, skip, method):
    import functools
    @functools.wraps(f)
    def changed(*args, **kwargs):
        if skip:
            return args[method] if len(args) > method else None
        return _other(f(*args, **kwargs))
    return changed
'''


def parts_of(name: str) -> tuple[str, str]:
    "Class, or '', and function."
    return tuple(name.split(".")) if "." in name else ("", name)


def lines_for(name: str, thing) -> str:
    "The code that changes a function where it has just been defined."
    owner, label = parts_of(name)
    tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    gives = any(isinstance(o, (ast.Return, ast.Yield)) and o.value for o in ast.walk(tree))
    skip = label.endswith("_") or not gives
    target = f"{owner}.{label}" if owner else label
    return f"{target} = _mutate({target}, {skip}, {int(bool(owner))})\n"


def change_module(path: Path, name: str, thing):
    path.write_text(path.read_text(encoding="utf-8") + CHANGED + lines_for(name, thing), encoding="utf-8")


def change_page(path: Path, name: str, thing):
    "Put a cell behind the one that defines the function, if the page does."
    owner, label = parts_of(name)
    nb = json.loads(path.read_text(encoding="utf-8"))
    for i, c in enumerate(nb["cells"]):
        source = "".join(c["source"])
        if c["cell_type"] != "code" or not source.startswith("#| export"):
            continue
        for o in ast.parse(source).body:
            inner = [k.name for k in getattr(o, "body", []) if isinstance(k, ast.FunctionDef)]
            patched = owner and isinstance(o, ast.FunctionDef) and o.name == label and owner in ast.unparse(o.args)
            within = isinstance(o, ast.ClassDef) and o.name == owner and label in inner
            if patched or within or not owner and isinstance(o, ast.FunctionDef) and o.name == label:
                source = CHANGED + lines_for(name, thing)
                new = dict(
                    cell_type="code", execution_count=None, id="changed0", metadata={}, outputs=[], source=source
                )
                nb["cells"].insert(i + 1, new)
                path.write_text(json.dumps(nb), encoding="utf-8")
                return


def run(path: Path, copy: Path, limit: int) -> bool | None:
    "Does a page or a file of tests pass in the copy? None if it took too long."
    here = copy / path.relative_to(root)
    tool = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", str(here)]
    if path.suffix == ".ipynb":
        tool = ["nbdev-test", str(here)]
    env = os.environ | dict(
        PYTHONPATH=str(copy), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false"
    )
    try:
        done = subprocess.run(tool, cwd=copy, env=env, capture_output=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return None
    return done.returncode == 0


def main():
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("names", nargs="*", help="public functions and Class.method")
    ask.add_argument("--all", action="store_true", help="every public function and method")
    ask.add_argument("--most", type=int, default=4, help="pages and files to run for a name")
    ask.add_argument("--limit", type=int, default=120, help="seconds for each")
    given = ask.parse_args()

    from book import modules, source_of
    from called import checked, public

    things = {k: o for k, o in public().things.items() if inspect.isfunction(o)}
    names = list(things) if given.all else given.names
    if unknown := [n for n in names if n not in things]:
        sys.exit(f"not public functions: {', '.join(unknown)}")
    pages = modules()
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "book"
        shutil.copytree(
            root, copy, ignore=shutil.ignore_patterns(".git", "__pycache__", "_proc", "_docs", ".pytest_cache")
        )
        for name in names:
            thing = things[name]
            module = thing.__module__.removeprefix("ftbook.")
            own, page = source_of(module), pages[module]
            rest = sorted(
                (p for p in checked().get(name, []) if p != page),
                key=lambda p: (p.suffix == ".ipynb", p.stat().st_size),
            )
            started, killer = time.time(), None
            change_module(copy / own.relative_to(root), name, thing)
            change_page(copy / page.relative_to(root), name, thing)
            for path in [page, *rest][: given.most]:
                if run(path, copy, given.limit) is False:
                    killer = path
                    break
            for path in (own, page):
                shutil.copy(path, copy / path.relative_to(root))
            survivors += [name] * (killer is None)
            said = killer.relative_to(root).as_posix() if killer else "SURVIVED"
            print(f"{name:32} {said:52} {time.time() - started:6.1f} s", flush=True)
    print(f"{len(names) - len(survivors)} of {len(names)} changes were noticed")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
