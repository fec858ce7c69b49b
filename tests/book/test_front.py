"The front of the repository: what the README, the forms and the files beside it promise is so."

import ast, json, os, re, subprocess, sys, tomllib

import pytest, yaml

import ftbook
from book import lessons, nbs, read_cells, root

readme = (root / "README.md").read_text(encoding="utf-8")
site = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Documentation"]
repo = "https://github.com/ftbook/ftbook"


def block(language):
    "The first block of a language in the README."
    return re.search(rf"^```{language}\n(.*?)^```", readme, re.M | re.S)[1]


# The README


def test_the_lines_of_python_are_about_ten():
    body = ast.parse(block("python")).body
    assert len(body) <= 11 and all(len(o) <= 100 for o in block("python").split("\n"))


@pytest.mark.slow
def test_the_lines_of_python_run_as_they_stand(tmp_path):
    "In an empty folder, in a process that knows nothing but the package and where it may take models from."
    (tmp_path / "lines.py").write_text(block("python"), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "lines.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONPATH=str(root)),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = (float(re.search(rf"{word}: ([\d.]+)% right", done.stdout)[1]) for word in ("before", "after"))
    assert before < 65 and after > 80, done.stdout
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


def test_the_badges_are_true():
    badges = dict(re.findall(r"^\[!\[([^\]]+)\]\((\S+?)\)\]", readme, re.M))
    minimum = re.search(r"min_python = (\S+)", (root / "settings.ini").read_text())[1]
    assert any(f"Python {minimum} or newer" in name for name in badges)
    licence = re.search(r"license = (\S+)", (root / "settings.ini").read_text())[1]
    assert f"Licence: {licence}" in badges and "Apache License" in (root / "LICENSE").read_text()[:200]
    for name, address in badges.items():
        if "/actions/workflows/" in address:
            file = re.search(r"/workflows/([\w.]+)/badge\.svg$", address)[1]
            workflow = yaml.safe_load((root / ".github/workflows" / file).read_text(encoding="utf-8"))
            assert workflow["name"] == name
    assert f"]({site})" in readme
    assert "pypi.org/project/ftbook" not in readme and "pypi/v/ftbook" not in readme, "it is not there"


def test_the_map_has_every_lesson_once_with_its_page_and_a_badge_for_every_part():
    sidebar = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    parts = {o["section"]: o["contents"] for o in sidebar if isinstance(o, dict) and o["contents"][0][:2].isdigit()}
    rows = [o for o in readme.split("\n") if re.match(r"\| (\[\d\d\]|\| \*\*)", o)]
    at = 0
    for part, pages in parts.items():
        colab = f"colab.research.google.com/github/ftbook/ftbook/blob/main/nbs/{pages[0]}"
        assert f"**{part}**" in rows[at] and colab in rows[at]
        for row, page in zip(rows[at + 1 :], pages):
            title = re.match(r"# (.+)", read_cells(nbs / page)[0]["source"])[1]
            wanted = f"| [{page[:2]}](nbs/{page}) | [{title}]({site}/{page[3:].replace('.ipynb', '.html')}) |"
            assert row.startswith(wanted) and len(row) > len(wanted) + 20
        at += 1 + len(pages)
    assert at == len(rows) == len(parts) + len(lessons())


def test_the_readme_is_short():
    "Three screens of 55 lines at 100 characters, besides the map of the lessons."
    text = readme[: readme.index("## The lessons")] + readme[readme.index("[Inside]") :]
    text = re.sub(r"\]\([^)]+\)|<!--.*?-->", "", text)
    lines = sum(max(1, -(-len(o) // 100)) for o in text.split("\n"))
    assert lines <= 165, lines


def test_what_the_readme_links_is_there():
    for target in re.findall(r"\]\((?!http)([^)#\s]+)\)", readme):
        assert (root / target).exists(), target
    for name in re.findall(rf"{repo}/blob/main/([\w./-]+)", readme):
        assert (root / name).exists(), name


def test_the_package_says_what_the_front_page_says():
    told = [c["source"] for c in read_cells(nbs / "index.ipynb", "markdown") if c["source"].startswith("#| export\n")]
    assert len(told) == 2
    llms = (nbs / "llms.txt").read_text(encoding="utf-8")
    for text in told:
        text = text.removeprefix("#| export\n").strip()
        assert text in ftbook.__doc__ and text in llms and text in readme


# Beside it


def test_the_citation_names_this_version():
    cited = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    assert (cited["version"], cited["license"]) == (ftbook.__version__, "Apache-2.0")
    assert cited["repository-code"] == repo and cited["url"] == site


FORMS = sorted((root / ".github/ISSUE_TEMPLATE").glob("*.yml"))
KEYS = {"input": {"label", "description", "placeholder", "value"}}
KEYS["textarea"] = KEYS["input"] | {"render"}


@pytest.mark.parametrize("path", [p for p in FORMS if p.stem != "config"], ids=lambda p: p.stem)
def test_a_form_is_one_that_github_takes(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(form) == {"name", "description", "labels", "body"}
    assert len({o["id"] for o in form["body"]}) == len(form["body"])
    for field in form["body"]:
        assert set(field) <= {"type", "id", "attributes", "validations"}
        assert "label" in field["attributes"] and set(field["attributes"]) <= KEYS[field["type"]]
        assert all(isinstance(v, str) for v in field["attributes"].values())
        assert field.get("validations", {"required": True}) == {"required": True}


def test_the_container_has_what_the_tests_need():
    made = json.loads((root / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
    run = (root / ".ci/run").read_text(encoding="utf-8")
    for package in ("chromium", "dict-jargon"):
        assert package in made["onCreateCommand"] and package in run
    assert ".[dev]" in made["postCreateCommand"] and made["image"].endswith(":3.11")


def test_what_commands_leave_behind_is_ignored(tmp_path):
    "In a clone, wherever the command was run from."
    asked = ["ftbook-runs/reviews/report.html", "nbs/ftbook-runs/quickstart", "ftbook-audits/x", "ftbook-fewshot/x"]
    done = subprocess.run(["git", "check-ignore", *asked], cwd=root, capture_output=True, text=True)
    assert done.stdout.split() == asked
