"The scripts of CI: one builder for the site, fresh front page, what language models read, and where the time goes."

import importlib.util, os, re, subprocess

import pytest, yaml

from book import lessons, nbs, read_cells, root

workflows = sorted((root / ".github/workflows").glob("*.yml"))


def load(name):
    spec = importlib.util.spec_from_file_location(name, root / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_slowest_cells_are_named():
    cell = next(c for c in read_cells(nbs / "inside/load.ipynb", "code") if c["source"].startswith("weights ="))
    log = (
        f"load.ipynb:{cell['id']}: 2.500s\n" + "".join(f"gone.ipynb:{n}: 1.{n}00s\n" for n in range(1, 10)) + "noise\n"
    )
    found = load("slowest").slowest(log)
    assert found[0] == "    2.5s load.ipynb weights = folder / 'model.safetensors'"
    assert len(found) == 10 and found[1].split() == ["1.9s", "gone.ipynb"]
    assert len(load("slowest").slowest(log, 3)) == 3


# One builder


def commands(path):
    "What a workflow runs, a line each."
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values()
    return [line for job in jobs for step in job["steps"] for line in step.get("run", "").split("\n") if line]


def actions(path):
    "What a workflow uses."
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values()
    return [step["uses"] for job in jobs for step in job["steps"] if "uses" in step]


def lines(name):
    "The lines of a script that are no comment."
    text = (root / ".ci" / name).read_text(encoding="utf-8")
    return [o.strip() for o in text.split("\n") if o.strip() and not o.startswith("#")]


def test_the_site_that_is_published_is_the_one_that_is_checked():
    "The workflow and .ci/run leave every step between the notebooks and the packed site to one script."
    builder, own = lines("build-site"), ("site.py", "whole.py", "pages.py", "nbdev-docs", "quarto", "smalldocs", "tar ")
    steps = [
        next(i for i, o in enumerate(builder) if name in o) for name in ("site.py", "whole.py", "pages.py", "tar ")
    ]
    assert steps == sorted(steps)
    for other in (lines("run"), commands(root / ".github/workflows/docs.yml")):
        assert other.count(".ci/build-site") == 1
        assert not [o for o in other if any(name in o for name in own)]
    packed = re.search(r"-cf (\S+)", "\n".join(builder))[1]
    jobs = yaml.safe_load((root / ".github/workflows/docs.yml").read_text())["jobs"]
    uploaded = [s["with"] for s in jobs["build"]["steps"] if "upload-artifact" in s.get("uses", "")]
    assert [(o["name"], o["path"]) for o in uploaded] == [("github-pages", packed)]
    assert not any("run" in step for step in jobs["publish"]["steps"]) and jobs["publish"]["needs"] == "build"


def test_the_tests_are_run_by_one_script():
    assert lines("run").count(".ci/check") == 1 and ".ci/check" in commands(root / ".github/workflows/test.yml")
    for other in (lines("run"), *map(commands, workflows)):
        assert not [o for o in other if re.search(r"nbdev-(test|clean|export)|pytest|ruff|readme\.py", o)]


@pytest.mark.parametrize("path", workflows, ids=lambda p: p.stem)
def test_actions_are_pinned(path):
    assert actions(path) and all(re.fullmatch(r"[\w/-]+@v\d+\.\d+\.\d+", o) for o in actions(path))


@pytest.mark.parametrize("name", ["run", "check", "build-site"])
def test_a_script_can_be_run_and_stops_at_the_first_fault(name):
    path = root / ".ci" / name
    assert os.access(path, os.X_OK) and "set -euo pipefail" in path.read_text()
    assert subprocess.run(["bash", "-n", path]).returncode == 0


def test_one_version_of_ruff():
    hooks = yaml.safe_load((root / ".pre-commit-config.yaml").read_text())["repos"]
    [used] = [o["rev"] for o in hooks if "ruff-pre-commit" in o["repo"]]
    known = dict(o.split("==") for o in (root / "constraints.txt").read_text().split("\n") if "==" in o)
    assert used == f"v{known['ruff']}"


# What language models read


def make_site(folder):
    "A small site with a page for each lesson, each with its copy."
    names = [re.sub(r"^\d+_", "", p.stem) for p in lessons()]
    for name in names:
        (folder / f"{name}.html").write_text("<h1>A page</h1>")
        (folder / f"{name}.html.md").write_text("# A page")
    links = "\n".join(f"- [A page](https://ftbook.github.io/ftbook/{name}.html.md): what it says" for name in names)
    (folder / "llms.txt").write_text(f"# ftbook\n\n{links}\n- [elsewhere](https://example.org/x.md)\n")
    return names


def test_llms_txt_lists_every_lesson(tmp_path):
    check, wanted = load("whole").llms_faults, [p.name for p in lessons()]
    names = make_site(tmp_path)
    assert check(tmp_path, wanted) == []
    (tmp_path / f"{names[0]}.html.md").unlink()
    assert check(tmp_path, wanted) == [
        f"{names[0]}.html has no copy in Markdown",
        f"llms.txt lists {names[0]}.html.md, which is not there",
    ]
    make_site(tmp_path)
    text = (tmp_path / "llms.txt").read_text()
    (tmp_path / "llms.txt").write_text(text.replace("lora.html.md", "lora.html"))
    assert "llms.txt does not list lora.html.md" in check(tmp_path, wanted)
    (tmp_path / "llms.txt").unlink()
    assert check(tmp_path, wanted) == ["llms.txt is not there"]


def test_the_lines_of_llms_txt_are_those_of_the_pages():
    site = load("site")
    assert site.page_line("10_lora.ipynb") == (
        "- [LoRA](https://ftbook.github.io/ftbook/lora.html.md): "
        "Write LoRA, train it beside a frozen model, and merge it into the weights"
    )
    sidebar = yaml.safe_load((root / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    assert [p.name for p in lessons()] == [p for p in site.listed(sidebar) if p[0].isdigit()]
    assert "inside/index.ipynb" in site.listed(sidebar)


def test_the_copies_have_the_names_that_the_docstrings_know(tmp_path, monkeypatch):
    site = load("site")
    monkeypatch.setattr(site, "root", tmp_path)
    (tmp_path / "_docs/inside").mkdir(parents=True)
    (tmp_path / "_docs/inside/parts.llms.md").write_text("see [LoRA](../lora.llms.md#merge) and [this](parts.llms.md)")
    assert site.name_copies() == 1
    [copy] = (tmp_path / "_docs").rglob("*.md")
    assert copy.name == "parts.html.md"
    assert copy.read_text() == "see [LoRA](../lora.html.md#merge) and [this](parts.html.md)"
    known = (root / "ftbook/methods/parts.py").read_text(encoding="utf-8").split('"""')[1]
    assert known.endswith("/inside/parts.html.md")
