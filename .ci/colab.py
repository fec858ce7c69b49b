"""Run notebooks as Colab does: one at a time, alone in an empty folder, in an environment that has PyTorch and nothing of ours.

    python .ci/colab.py                              three short pages that read results: a lesson, an Inside page, a page of the bench
    python .ci/colab.py nbs/10_lora.ipynb            those that are named
    python .ci/colab.py --all --log colab.jsonl      every notebook; the log is written as it goes, and what passed is not run again

The setup cell of each notebook installs the wheel that is built here, with its extra `notebooks`, and clones what is committed here
for the results that pages read. Cells marked `slow` measure for hours; they are left out, as nbdev's tests leave them out. `--env
FOLDER` keeps the environment, and takes it as it is when it is there.
"""

import argparse, json, os, re, shutil, subprocess, sys, tempfile, time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

root = Path(__file__).resolve().parent.parent
nbs = root / "nbs"
CHOSEN = "23_merging_tasks.ipynb", "inside/bench_labels.ipynb", "bench/adapters.ipynb"
HOUR = 3600  # The longest that a cell may take, in seconds


def pages() -> list[str]:  # Paths below nbs
    "Find every notebook that runs."
    found = (p.relative_to(nbs) for p in nbs.rglob("*.ipynb"))
    return sorted(
        p.as_posix() for p in found if not any(o[0] in "._" for o in p.parts) and p.as_posix() != "index.ipynb"
    )


def build_wheel(
    folder: Path,  # Where to put it
) -> Path:  # The wheel
    "Build the package as it would be published, from a copy: an old build folder would be taken along."
    beside = shutil.ignore_patterns(".*", "_docs", "_proc", "*.egg-info", "__pycache__", "build", "nbs", "tests")
    with tempfile.TemporaryDirectory() as tmp:
        source = shutil.copytree(root, Path(tmp) / "source", ignore=beside)
        pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", folder, source)
    return next(folder.glob("ftbook-*.whl"))


def pip(
    python: str | Path,  # Whose environment
    *words,  # Of the command
) -> None:
    "Run pip in silence; SystemExit with what it said where it fails."
    done = subprocess.run([python, "-m", "pip", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"pip {' '.join(map(str, words))}\n{done.stdout}{done.stderr}")


def make_environment(
    folder: Path,  # Where; one that is there is taken as it is
) -> Path:  # Its interpreter
    "Make an environment with what Colab has and the notebooks lean on: a kernel, and the PyTorch that was tested."
    python = folder / "bin/python"
    if python.exists():
        pip(python, "uninstall", "-yq", "ftbook")  # an older wheel of the same version
    else:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        tested = re.search(r"^torch==.+$", (root / "constraints.txt").read_text(), re.M)[0]
        pip(python, "install", "--no-compile", tested, "ipykernel")
    return python


def check_environment(
    python: Path,  # Its interpreter
) -> None:
    "SystemExit unless packages fit each other and ftbook is the one that a notebook installed."
    pip(python, "check")
    where = [python, "-c", "import ftbook; print(ftbook.__file__)"]
    file = subprocess.run(where, capture_output=True, text=True, cwd=python.parent).stdout.strip()
    if not Path(file or "/").is_relative_to(python.parent.parent):
        sys.exit(f"the notebooks ran with {file or 'no ftbook'}, and not with the wheel")


def add_kernel(
    folder: Path,  # A folder of Jupyter's; it is made
    python: Path,  # The interpreter of the kernel
    wheel: Path,  # What its notebooks install
) -> None:
    "Make the kernel `colab` known to this process."
    spec = folder / "kernels/colab/kernel.json"
    spec.parent.mkdir(parents=True)
    env = dict(
        FTBOOK_COLAB=wheel.as_uri(),
        FTBOOK_REPOSITORY=root.as_uri(),
        HF_HUB_OFFLINE="1",
        PIP_NO_COMPILE="1",
        PATH=f"{python.parent}{os.pathsep}{os.environ['PATH']}",
    )
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]
    spec.write_text(json.dumps(dict(argv=argv, display_name="colab", language="python", env=env)))
    os.environ["JUPYTER_PATH"] = str(folder)
    os.environ.pop("PYTHONPATH", None)  # it would lead to the clone


def run_page(
    page: str,  # Its path below nbs
) -> dict:  # page, passed, seconds; for one that failed the cell, counted from 0 as in the file, and what was said
    "Run one notebook in a folder of its own, up to its first error."
    notebook, failed = nbformat.read(nbs / page, as_version=4), {}
    for cell in notebook.cells:
        if cell.cell_type == "code" and re.search(r"^#\|\s*slow\b", cell.source, re.M):
            cell.metadata.tags = ["skip-execution"]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="colab-") as tmp:
        folder = Path(tmp) / "content" / "page"
        folder.mkdir(parents=True)
        client = NotebookClient(
            notebook,
            kernel_name="colab",
            timeout=HOUR,
            resources=dict(metadata=dict(path=str(folder))),
            on_cell_error=lambda cell, cell_index, execute_reply: failed.update(cell=cell_index),
            on_cell_start=lambda cell, cell_index: failed.update(last=cell_index),
        )
        try:
            client.execute()
        except CellExecutionError as e:
            failed["said"] = f"{e.ename}: {e.evalue}"
        except (CellTimeoutError, DeadKernelError) as e:
            failed |= dict(cell=failed.get("last"), said=f"{type(e).__name__}: {e}")
    found = dict(page=page, passed="said" not in failed, seconds=round(time.perf_counter() - start, 1))
    return found if found["passed"] else found | dict(cell=failed.get("cell"), said=failed["said"].strip()[:2000])


def line(
    found: dict,  # From `run_page`
) -> str:  # One line, or two where it failed
    "Say how a page went."
    why = "" if found["passed"] else f"\n    cell {found['cell']}: {found['said'][:300]}"
    return f"{'passed' if found['passed'] else 'FAILED'} {found['seconds']:7.1f} s  {found['page']}{why}"


def read_log(
    log: Path | None,  # A file of earlier runs
) -> dict[str, dict]:  # The last run of each page
    "Read what was run before."
    lines = log.read_text(encoding="utf-8").splitlines() if log and log.exists() else []
    return {o["page"]: o for o in map(json.loads, lines)}


def run_pages(
    names: list[str],  # Paths below nbs
    log: Path | None,  # Where each run is written down, a line each; None writes nothing
) -> list[dict]:  # Of every page, what `run_page` found, now or before
    "Run those that have not passed, one after the other."
    found = read_log(log)
    for page in names:
        if not found.get(page, {}).get("passed"):
            found[page] = run_page(page)
            print(line(found[page]), flush=True)
            if log:
                with log.open("a", encoding="utf-8") as f:
                    f.write(json.dumps(found[page]) + "\n")
    return [found[page] for page in names]


def main() -> None:
    "Build, run, and say which failed."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", help="notebooks, as paths or below nbs")
    parser.add_argument("--all", action="store_true", help="every notebook")
    parser.add_argument("--log", type=Path, help="a file of JSON lines; what passed there is not run again")
    parser.add_argument("--env", type=Path, help="a folder for the environment, which stays")
    given = parser.parse_args()
    known = pages()
    names = known if given.all else [o.removeprefix("nbs/") for o in given.notebooks] or list(CHOSEN)
    if unknown := sorted({*names} - {*known}):
        parser.error(f"no such notebook: {', '.join(unknown)}")
    with tempfile.TemporaryDirectory() as tmp:
        wheel = build_wheel(Path(tmp))
        python = make_environment((given.env or Path(tmp) / "env").resolve())
        add_kernel(Path(tmp) / "jupyter", python, wheel)
        found = run_pages(names, given.log)
        check_environment(python)
    failed = [o["page"] for o in found if not o["passed"]]
    print(f"{len(found) - len(failed)} of {len(found)} notebooks ran alone, {sum(o['seconds'] for o in found):.0f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
