"What CI prints about time."

import importlib.util

from book import read_cells, nbs, root


def load(name):
    spec = importlib.util.spec_from_file_location(name, root / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_slowest_cells_are_named():
    cell = next(c for c in read_cells(nbs / "inside/load.ipynb", "code") if c["source"].startswith("weights ="))
    log = (
        f"load.ipynb:{cell['id']}: 2.500s\n" + "".join(f"gone.ipynb:{n}: 1.{n}00s\n" for n in range(1, 10)) + "noise\n"
    )
    found = load("slowest").slowest(log)
    assert found[0] == "    2.5s load.ipynb weights = folder / 'model.safetensors'"
    assert len(found) == 10 and found[1].split() == ["1.9s", "gone.ipynb"]
    assert len(load("slowest").slowest(log, 3)) == 3
