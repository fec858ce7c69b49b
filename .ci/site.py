"""Build the book's site in _docs/ without Quarto and without a network.

nbdev stages the notebooks, smalldocs renders them, and this script sees to what lies between the two: pages get the
address that nbdev and Quarto give them (09_lora.ipynb becomes lora.html), formulas become MathML, which a browser shows
by itself, and fonts from elsewhere are left out. Each page has a copy in Markdown where the docstrings say that it is
(lora.html.md), and llms.txt lists them.
"""

import html, json, os, re, shutil, subprocess, sys, tempfile
from pathlib import Path

import yaml
from latex2mathml.converter import convert
from nbdev.config import get_config, nbpath2html
from nbdev.serve import proc_nbs

root = Path(__file__).resolve().parent.parent
formula = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)
katex = re.compile(r'\s*<(?:link|script)[^>]*/katex@[^>]*>(?:</script>)?')


def rename_pages(
    folder: Path,  # The staged notebooks; changed in place
) -> None:
    "Give each staged notebook the name of its page, lead links and the sidebar there, and drop what only Quarto reads."
    moved = {p: p.with_name(nbpath2html(p).stem + ".ipynb") for p in folder.rglob("*.ipynb")}
    if len({*moved.values()}) < len(moved):
        sys.exit(f"two notebooks want the same page: {sorted(map(str, moved.values()))}")
    names = "|".join(re.escape(p.name) for p, page in moved.items() if p.name != page.name) or "(?!)"
    link = re.compile(rf"(\]\((?![a-z]+:)[^)\s]*?|^\s*- (?:[\w-]+/)*)({names})", re.M)
    for path, page in [*moved.items(), (folder / "_quarto.yml", folder / "_quarto.yml")]:
        text = link.sub(lambda m: m[1] + nbpath2html(m[2]).stem + ".ipynb", path.read_text(encoding="utf-8"))
        path.write_text(
            re.sub(r'^ *"?(output-file|html-math-method|grid): .*\n', "", text, flags=re.M), encoding="utf-8"
        )
        path.rename(page)


def typeset(
    match: re.Match,  # A formula as smalldocs leaves it for KaTeX
) -> str:  # The same formula in MathML
    "Turn one formula from TeX into MathML; one with a command that MathML cannot say stops the build."
    tex = html.unescape(match[2])
    mathml = convert(tex, display="block" if match[1] == "display" else "inline")
    if "\\" in html.unescape(mathml):
        sys.exit(f"cannot typeset {tex}")
    return mathml


def finish_page(
    path: Path,  # A rendered page; changed in place
) -> int:  # Formulas that were typeset
    "Typeset a page's formulas, and drop the KaTeX that would have come from outside."
    text, n = formula.subn(typeset, path.read_text(encoding="utf-8"))
    text = katex.sub("", text)
    home = get_config()
    text = text.replace(
        f'href="{home.doc_host}{home.doc_baseurl}/', f'href="{"../" * len(path.relative_to(root / "_docs").parts[:-1])}'
    )
    path.write_text(text, encoding="utf-8")
    return n


folded = re.compile(r'<details[^>]* class="code-fold">\s*<summary>Source of ([^<]*)</summary>')
named = re.compile(r'<a href="([^"#:]*)#([^"]+)"([^>]*)>(<code>)')


def add_places(
    path: Path,  # A rendered page; changed in place
) -> None:
    "Give each name whose source is folded a place of its own, in the lower case that nbdev's links have."

    def place(match):
        names = [o.strip().lower() for o in match[1].split(",")]
        return "".join(f'<a id="{html.escape(n)}"></a>' for n in names) + match[0]

    path.write_text(folded.sub(place, path.read_text(encoding="utf-8")), encoding="utf-8")


def mend_links(
    paths: list[Path],  # All rendered pages; changed in place
) -> int:  # Links that changed
    "A name that nbdev links to may have no place of its own: a method leads to its class, the rest to the page."
    places = {p: set(re.findall(r'(?:id|name)="([^"]+)"', p.read_text(encoding="utf-8"))) for p in paths}
    changed = 0
    for path in paths:

        def mend(match):
            nonlocal changed
            target = (path.parent / match[1]).resolve() if match[1] else path.resolve()
            if target not in places or match[2] in places[target]:
                return match[0]
            changed += 1
            whole = match[2].split(".")[0]
            anchor = f"#{whole}" if whole in places[target] else ""
            return f'<a href="{match[1] or path.name}{anchor}"{match[3]}>{match[4]}'

        path.write_text(named.sub(mend, path.read_text(encoding="utf-8")), encoding="utf-8")
    return changed


def name_copies() -> int:  # How many there are
    "Give the Markdown copy of each page the name that the docstrings of the modules know."
    copies = sorted((root / "_docs").rglob("*.llms.md"))
    for path in copies:
        text = path.read_text(encoding="utf-8").replace(".llms.md)", ".html.md)").replace(".llms.md#", ".html.md#")
        path.with_name(path.name.replace(".llms.md", ".html.md")).write_text(text, encoding="utf-8")
        path.unlink()
    return len(copies)


def listed(
    contents: list,  # Of a sidebar: pages, and sections of pages
) -> list[str]:  # The pages alone
    "Flatten a part of the sidebar."
    return [p for o in contents for p in ([o] if isinstance(o, str) else listed(o.get("contents", [])))]


def page_line(
    page: str,  # A notebook, below nbs/
) -> str:  # A link to its Markdown copy, with its subtitle
    "A line of llms.txt."
    told = read_title(root / "nbs" / page)
    home = get_config()
    return f"- [{told[0]}]({home.doc_host}{home.doc_baseurl}/{nbpath2html(Path(page)).as_posix()}.md): {told[1]}"


def read_title(
    path: Path,  # A notebook
) -> tuple[str, str]:  # Its title and its subtitle
    "The first cell of a page."
    first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
    title, _, subtitle = re.match(r"# (.+)(\n+> (.+))?", first).groups()
    return title, subtitle or ""


def write_llms() -> None:
    "List every page for language models: what nbdev says of the package, then the lessons, the bench, and Inside."
    sidebar = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    parts = {"Lessons": [], "Measured": [], "Optional": []}
    for page in listed(sidebar[1:]):
        part = "Optional" if page.startswith("inside/") else "Measured" if page.startswith("bench/") else "Lessons"
        parts[part].append(page_line(page))
    intro = re.sub(r"<!--.*?-->", "", (root / "nbs/llms.txt").read_text(encoding="utf-8"), flags=re.S).strip()
    sections = [f"## {name}\n\n" + "\n".join(lines) for name, lines in parts.items()]
    (root / "_docs/llms.txt").write_text("\n\n".join([intro, *sections]) + "\n", encoding="utf-8")


def render() -> None:
    "Stage, rename and render every page."
    staged = proc_nbs(force=True)
    with tempfile.TemporaryDirectory() as tmp:
        pages = Path(tmp) / "pages"
        shutil.copytree(staged, pages, ignore=shutil.ignore_patterns("_docs"))
        rename_pages(pages)
        subprocess.run([sys.executable, "-m", "smalldocs.cli", "render", "--strict", "--quiet", str(pages)], check=True)
        shutil.rmtree(root / "_docs", ignore_errors=True)
        shutil.copytree(pages / "_docs", root / "_docs")


def finish() -> None:
    "Finish every rendered page, and write what lies beside the pages."
    for style in (root / "_docs").rglob("*.css"):
        style.write_text(
            re.sub(r'@import url\("?https?:[^)]*\);?', "", style.read_text(encoding="utf-8")), encoding="utf-8"
        )
    shutil.copy(root / "ftbook/assets/recipe.schema.json", root / "_docs")  # where recipes say that it is
    done = {p.resolve(): finish_page(p) for p in sorted((root / "_docs").rglob("*.html"))}
    for path in done:
        add_places(path)
    changed = mend_links(list(done))
    copies = name_copies()
    write_llms()
    print(
        f"_docs: {len(done)} pages, {copies} copies in Markdown, {sum(done.values())} formulas, "
        f"{changed} links to what has no place of its own"
    )


if __name__ == "__main__":
    os.chdir(root)
    render()
    finish()
