"""Keep the saved outputs of the notebooks fit for a reader who does not run them. Run it after `nbdev-clean`.

Drawings become images, which a notebook that is not trusted shows too. The name of a widget goes, since a notebook that
is opened again has no kernel behind it; what the widgets were goes too. The line in an explorer that says where its
controls are alive gets the address of the page. Progress bars go. `--check` writes nothing and exits 1 when a notebook
would change.
"""

import json, re, sys
from pathlib import Path

from nbdev.config import get_config, nbpath2html

from ftbook.show.explorer import STILL
from ftbook.show.images import as_images

root = Path(__file__).resolve().parent.parent
view = "application/vnd.jupyter.widget-view+json"
still = re.compile(r'<p class="ftbook-still">.*?</p>', re.S)
progress = re.compile(r"^.*(?:\d+%\||\[\d\d:\d\d[^\]]*/\w+\]|Writing model shards|Loading weights).*\n?", re.M)


def page_of(
    path: Path,  # A notebook below nbs/
) -> str:  # The address of its page
    "Say where the site shows a notebook."
    home = get_config()
    return f"{home.doc_host}{home.doc_baseurl}/{nbpath2html(path.relative_to(root / 'nbs')).as_posix()}"


def clean_html(
    html: str,  # As an output holds it
    page: str,  # The address of its page
) -> str:  # The same without inline drawings, and with the address in an explorer's line
    "Mend a piece of HTML."
    told = STILL.replace(" or run.", f' or run, and on <a href="{page}">the book\'s site</a>.')
    return still.sub(told, as_images(html))


def clean_output(
    output: dict,  # Of a cell; changed in place
    page: str,  # The address of its page
) -> bool:  # Is there anything left to show?
    "Mend one output."
    data = output.get("data", {})
    widget = data.pop(view, None)
    if "text/html" in data:
        html = "".join(data["text/html"])
        data["text/html"] = clean_html(html, page).splitlines(True)
    elif widget is not None:
        return False
    if "text" in output:
        output["text"] = progress.sub("", "".join(output["text"])).splitlines(True)
        return bool(output["text"])
    return True


def clean_notebook(
    text: str,  # A notebook, as it is on the disk
    page: str,  # The address of its page
) -> str:  # The same, clean
    "Mend all outputs of a notebook."
    nb = json.loads(text)
    nb["metadata"].pop("widgets", None)
    for cell in nb["cells"]:
        if "outputs" in cell:
            cell["outputs"] = [o for o in cell["outputs"] if clean_output(o, page)]
    return json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def main() -> None:
    "Clean every notebook, or say which are not clean."
    changed = []
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        if any(o[0] in "._" for o in path.relative_to(root / "nbs").parts):
            continue
        text = path.read_text(encoding="utf-8")
        clean = clean_notebook(text, page_of(path))
        if clean != text:
            changed.append(path.relative_to(root).as_posix())
            if "--check" not in sys.argv:
                path.write_text(clean, encoding="utf-8")
    print(*changed, sep="\n", end="\n" * bool(changed))
    if "--check" in sys.argv and changed:
        sys.exit("These notebooks hold what a reader should not see: run `python .ci/outputs.py`")


if __name__ == "__main__":
    main()
