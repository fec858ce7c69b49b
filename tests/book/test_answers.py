"The front page's numbers are those of the results, and those that the bench pages show."

import importlib.util, json, re, subprocess, sys

from book import nbs, root


def test_the_table_is_fresh():
    done = subprocess.run([sys.executable, root / ".ci/answers.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_picture_is_fresh(tmp_path):
    "The front page's picture is what the committed measurement draws."
    spec = importlib.util.spec_from_file_location("picture", root / ".ci/picture.py")
    picture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(picture)
    picture.chart().save(tmp_path / "drawn.svg")
    assert (tmp_path / "drawn.svg").read_bytes() == (nbs / "images/quickstart.svg").read_bytes()


def shown(page):
    "Every text that a page's saved outputs show, without markup."
    cells = json.loads((nbs / page).read_text(encoding="utf-8"))["cells"]
    outputs = [o for c in cells for o in c.get("outputs", [])]
    html = "".join("".join(o.get("data", {}).get("text/html", "")) for o in outputs)
    return re.sub(r"<[^>]+>", " ", html)


def test_the_pages_show_the_same_numbers():
    readme = (root / "README.md").read_text(encoding="utf-8")
    row = next(line for line in readme.split("\n") if "bench/training.ipynb" in line and "tokens/s" in line)
    page = shown("bench/training.ipynb")
    numbers = [re.search(pattern, row)[1] for pattern in (r"(\d+) tokens/s", r"PEFT: (\d+)", r"packed: (\d+)")]
    assert all(re.search(rf"\b{n}\b", page) for n in numbers), numbers
    row = next(line for line in readme.split("\n") if "bench/dedup.ipynb" in line and "texts/s" in line)
    page = shown("bench/dedup.ipynb")
    numbers = [re.search(pattern, row)[1] for pattern in (r"([\d,]+) texts/s", r"datasketch: ([\d,]+)")]
    assert all(n in page for n in numbers), numbers
