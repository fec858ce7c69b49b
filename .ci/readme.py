"""Write README.md from nbs/index.ipynb, without Quarto. `--check` writes nothing and exits 1 when README.md is stale.

A link from one notebook to another leads to the notebook in the repository. The title of a lesson leads to the lesson's
page on the site instead, for GitHub shows a notebook without what moves in it.
"""

import json, re, sys, tomllib
from pathlib import Path

root = Path(__file__).resolve().parent.parent
site = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Documentation"]


def point(
    match: re.Match,  # A Markdown link or picture: its label, then its target
) -> str:  # The same, with a target that works from the root of the repository
    "Make a link that is relative to nbs/ relative to the root, or to the site where it is a lesson's title."
    label, target = match.groups()
    if re.match(r"[a-z]+:|#|/", target):
        return match[0]
    if target.startswith("../"):
        return f"{label}({target.removeprefix('../')})"
    lesson = re.fullmatch(r"\d\d_(\w+)\.ipynb", target)
    if lesson and not label.strip("[]").isdigit():
        return f"{label}({site}/{lesson[1]}.html)"
    return f"{label}(nbs/{target})"


def cell_text(
    cell: dict,  # A notebook cell
) -> str:  # Its Markdown: prose as it is, code in a fence, stored text output in another
    "Turn one cell into Markdown; a hidden cell has none."
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        source = re.sub(r"\A(?:#\|.*\n)+", "", source)  # what nbdev is told of it
        return re.sub(r"(!?\[[^\]]*\])\(([^)\s]+)\)", point, source)
    if cell["cell_type"] != "code" or re.search(r"^#\|\s*hide\b", source, re.M):
        return ""
    code = "\n".join(o for o in source.split("\n") if not o.startswith("#|"))
    stored = ["".join(o.get("text") or o.get("data", {}).get("text/plain", "")) for o in cell["outputs"]]
    return "\n\n".join(
        f"```{lang}\n{o.strip()}\n```" for lang, o in [("python", code)] + [("", s) for s in stored] if o.strip()
    )


def readme() -> str:  # All of README.md
    "Read nbs/index.ipynb and give the README that belongs to it."
    cells = json.loads((root / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]
    note = "<!-- Made from nbs/index.ipynb by .ci/readme.py. Edit the notebook. -->"
    return "\n\n".join([note] + [t for t in map(cell_text, cells) if t.strip()]) + "\n"


if __name__ == "__main__":
    path, text = root / "README.md", readme()
    if "--check" not in sys.argv:
        path.write_text(text, encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != text:
        sys.exit("README.md is stale: run `python .ci/readme.py`")
    else:
        print("README.md is fresh")
