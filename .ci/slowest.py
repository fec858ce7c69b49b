"""Print the ten slowest cells of a run of `nbdev-test --cell-timing-min 1`, each with its page and what it begins with:
python .ci/slowest.py LOG. The times are the run's own; nothing runs again."""

import json, re, sys
from pathlib import Path

nbs = Path(__file__).resolve().parent.parent / "nbs"
timed = re.compile(r"^(\S+\.ipynb):(\S+): (\d+\.\d+)s$", re.M)


def begins_with(page: str, cell: str) -> str:
    "The first line of a cell that says something."
    for path in nbs.rglob(page):
        for c in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if c.get("id") == cell:
                lines = [o for o in "".join(c["source"]).split("\n") if o.strip() and not o.startswith("#")]
                return lines[0] if lines else ""
    return ""


def slowest(log: str, most: int = 10) -> list[str]:
    "A line for each of the slowest cells."
    found = sorted(timed.findall(log), key=lambda o: -float(o[2]))[:most]
    return [f"{float(t):7.1f}s {page} {begins_with(page, cell)}" for page, cell, t in found]


if __name__ == "__main__":
    print("The slowest cells:", *slowest(Path(sys.argv[1]).read_text(encoding="utf-8")), sep="\n")
