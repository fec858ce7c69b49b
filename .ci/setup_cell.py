"""Begin every notebook with the badge and the setup cell of nbs/inside/colab.ipynb. `--check` writes nothing and exits 1 if one
differs.

Badge and cell stand behind the title. The cell installs ftbook on Colab and brings what pages read; elsewhere it does nothing. The
front page has no code, so it has neither.
"""

import hashlib, json, sys
from pathlib import Path

nbs = Path(__file__).resolve().parent.parent / "nbs"
home = nbs / "inside/colab.ipynb"
BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/ftbook/ftbook/blob/main/nbs/{page})"
)


def pages() -> list[Path]:  # Every notebook but the front page
    "Find the notebooks that run."
    found = (p for p in nbs.rglob("*.ipynb") if not any(o[0] in "._" for o in p.relative_to(nbs).parts))
    return sorted(p for p in found if p != nbs / "index.ipynb")


def setup_source() -> list[str]:  # Its lines, as a notebook holds them
    "The setup cell: the first cell of code on its own page."
    cells = json.loads(home.read_text(encoding="utf-8"))["cells"]
    return next(c["source"] for c in cells if c["cell_type"] == "code")


def is_setup(
    cell: dict,  # A cell
) -> bool:  # Whether it is a setup cell, of today or of an older edition
    "Does a cell install ftbook?"
    return cell["cell_type"] == "code" and 'pip install -Uqq "ftbook[notebooks]' in "".join(cell["source"])


def begin(
    cells: list[dict],  # A notebook's
    page: str,  # Its path below nbs
    source: list[str],  # From `setup_source`
) -> list[dict]:  # The same, with badge and setup cell behind the title
    "Put badge and setup cell in their place; cells that stand there keep their ids."
    badge = dict(cell_type="markdown", metadata={}, source=[BADGE.format(page=page)])
    setup = dict(cell_type="code", execution_count=None, metadata={}, outputs=[], source=source)
    rest, kept = cells[1:], []
    for new, belongs in (badge, lambda c: "colab-badge.svg" in "".join(c["source"])), (setup, is_setup):
        old = next((c for c in rest[:2] if belongs(c)), None)
        rest = [c for c in rest if c is not old]
        made = hashlib.sha256(f"{page} {new['cell_type']}".encode()).hexdigest()[:8]
        kept.append(new | dict(id=old["id"] if old else made))
    return [cells[0], *kept, *rest]


def main() -> None:
    "Write every notebook that differs, or name them."
    source, changed = setup_source(), []
    for path in pages():
        text = path.read_text(encoding="utf-8")
        notebook, page = json.loads(text), path.relative_to(nbs).as_posix()
        notebook["cells"] = begin(notebook["cells"], page, source)
        new = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        if new != text:
            changed.append(page)
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf-8")
    if changed and "--check" in sys.argv:
        sys.exit("These begin otherwise: run `python .ci/setup_cell.py`\n" + "\n".join(changed))
    print(f"{len(changed)} of {len(pages())} notebooks changed")


if __name__ == "__main__":
    main()
