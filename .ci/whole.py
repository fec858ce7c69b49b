"""Read every page of the built site, and fail where it is not whole.

A link must lead to a page, and an anchor to a place on it. A paragraph that ends with a colon introduces something, so
something must follow. Pages call each other by their titles: a numbered chapter is one of the first edition. Every page has
its copy in Markdown, and llms.txt lists every lesson and nothing that is not there. No directive of nbdev is left in prose.
"""

import re, sys, tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

root = Path(__file__).resolve().parent.parent
headings = {"h1", "h2", "h3", "h4", "h5", "h6"}
blocks = {
    "p",
    "pre",
    "table",
    "ul",
    "ol",
    "figure",
    "svg",
    "img",
    "details",
    "blockquote",
    "math",
    "iframe",
    "form",
} | headings
chapter = re.compile(r"\b[Cc]hapter \d+\b")


class Page(HTMLParser):
    "What the checks want to know of a page: places, links, and the order of its blocks."

    def __init__(self):
        super().__init__()
        self.ids, self.links, self.order, self.chapters = set(), [], [], []
        self.inside, self.text, self.main = [], "", 0

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids |= {found[k] for k in ("id", "name") if found.get(k)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag == "main":
            self.main += 1
        if not self.main:
            return
        if tag in ("pre", "code", "script", "style"):
            self.inside.append(tag)
        if tag in blocks:
            self.order.append([tag, ""])

    def handle_endtag(self, tag):
        if tag == "main":
            self.main -= 1
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data):
        if not self.main or self.inside:
            return
        if self.order:
            self.order[-1][1] += data
        self.chapters += chapter.findall(data)


def read_page(
    path: Path,  # A built page
) -> Page:  # What is on it
    "Parse one page."
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def faults(
    site: Path,  # The built site
    path: Path,  # One of its pages
    pages: dict[Path, Page],  # All of them
) -> list[str]:  # What is wrong with it
    "List what is wrong with one page."
    page, found = pages[path], []
    for link in page.links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        target = target / "index.html" if target.is_dir() else target
        if not target.is_file():
            found.append(f"{link} leads nowhere")
        elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
            found.append(f"{link}: there is no such place on the page")
    found += [f"speaks of {name}" for name in page.chapters]
    found += [f"shows a directive: {text.strip()[:60]}" for tag, text in page.order if text.lstrip().startswith("#|")]
    for (tag, text), (after, _) in zip(page.order, [*page.order[1:], ("h2", "")]):
        if tag == "p" and text.rstrip().endswith(":") and after in headings:
            found.append(f"introduces what is not there: {' '.join(text.split())[-90:]}")
    return found


def llms_faults(
    site: Path,  # The built site
    lessons: list[str],  # Names of notebooks
) -> list[str]:  # What is wrong with what language models read
    "Check llms.txt and the copies in Markdown."
    found = [
        f"{p.relative_to(site)} has no copy in Markdown"
        for p in sorted(site.rglob("*.html"))
        if "site_libs" not in p.parts and not p.with_name(p.name + ".md").is_file()
    ]
    index = site / "llms.txt"
    if not index.is_file():
        return [*found, "llms.txt is not there"]
    home = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Documentation"]
    text = index.read_text(encoding="utf-8")
    pages = [o.removeprefix(f"{home}/") for o in re.findall(r"\]\(([^)\s]+)\)", text) if o.startswith(home)]
    found += [f"llms.txt lists {p}, which is not there" for p in pages if not (site / p).is_file()]
    wanted = [re.sub(r"^\d+_", "", name).replace(".ipynb", ".html.md") for name in lessons]
    return found + [f"llms.txt does not list {p}" for p in wanted if p not in pages]


if __name__ == "__main__":
    site = (Path(sys.argv[1]) if len(sys.argv) > 1 else root / "_docs").resolve()
    pages = {p: read_page(p) for p in sorted(site.rglob("*.html")) if "site_libs" not in p.parts}
    if not pages:
        sys.exit(f"{site} holds no pages: run .ci/site.py first")
    bad = 0
    for path in pages:
        for fault in dict.fromkeys(faults(site, path, pages)):
            bad += 1
            print(f"{path.relative_to(site)}: {fault}")
    for fault in llms_faults(site, [p.name for p in sorted((root / "nbs").glob("[0-9][0-9]_*.ipynb"))]):
        bad += 1
        print(fault)
    print(f"{len(pages)} pages read, {bad} faults")
    sys.exit(bool(bad))
