"The front page's numbers are those of the results, and those that the bench pages show."

import json, re, subprocess, sys

from book import nbs, root


def test_the_table_is_fresh():
    done = subprocess.run([sys.executable, root / ".ci/answers.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
