"""Open notebooks in a real JupyterLab as a reader does who has just downloaded them, and again after trusting them.

Not trusted: every figure that the notebook holds must be seen as an image, and every explorer must say where its
controls are alive. Trusted, and not run: every explorer must have its controls, each must move its picture, and no widget
may be looked for. JupyterLab starts without settings and without signatures of its own, on a free port of the loopback.
"""

import argparse, json, os, re, shutil, socket, subprocess, sys, tempfile, time, urllib.error, urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright

from pages import browsers, flags, move

root = Path(__file__).resolve().parent.parent
usual = ["nbs/inside/explorer.ipynb", "nbs/12_adapters.ipynb"]
figures = """() => [...document.querySelectorAll('.jp-OutputArea-output img[src^="data:image/svg+xml"]')]
  .filter(i => i.complete && i.naturalWidth > 0 && i.getBoundingClientRect().width > 20).length"""


def shown_in(
    path: Path,  # A notebook
) -> dict[str, int]:  # How many figures and explorers its outputs hold
    "Count what a reader should see."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    html = ["".join(o.get("data", {}).get("text/html", "")) for c in cells for o in c.get("outputs", [])]
    explorers = [o for o in html if "data-ftbook-explorer " in o]
    count = lambda texts: sum(o.count('src="data:image/svg+xml') for o in texts)
    return dict(figures=count(html), in_explorers=count(explorers), explorers=len(explorers))


def start(
    folder: Path,  # What it serves, and where it keeps its own files
) -> tuple[subprocess.Popen, str, dict]:  # The process, its address, its environment
    "Start JupyterLab with nothing of this machine's settings."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    own = {f"JUPYTER_{o}_DIR": str(folder / f".{o.lower()}") for o in ("CONFIG", "DATA", "RUNTIME")}
    own |= {f"JUPYTERLAB_{o}_DIR": str(folder / f".{o.lower()}") for o in ("SETTINGS", "WORKSPACES")}
    env = os.environ | own
    quiet = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}
    (folder / ".config/labconfig").mkdir(parents=True)
    (folder / ".config/labconfig/default_setting_overrides.json").write_text(json.dumps(quiet))
    options = f"--no-browser --allow-root --ip=127.0.0.1 --port={port} --ServerApp.port_retries=0".split()
    options += ["--IdentityProvider.token=", f"--ServerApp.root_dir={folder}"]
    log = open(folder / ".log", "w")
    process = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=env, stdout=log, stderr=log)
    home = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{home}/api", timeout=1)
            return process, home, env
        except (urllib.error.URLError, OSError):
            time.sleep(0.25)
            if process.poll() is not None:
                break
    sys.exit("JupyterLab did not start:\n" + (folder / ".log").read_text()[-2000:])


def open_notebook(
    browser,  # Chromium
    url: str,  # Of the notebook
):  # A browser page with all of its cells drawn
    "Open a notebook, and scroll through it once, since JupyterLab draws a cell when it comes near."
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.goto(url, wait_until="load")
    page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for(timeout=60_000)
    page.locator(".jp-OutputArea-output").first.wait_for(timeout=60_000)
    page.wait_for_timeout(500)
    box = page.locator(".jp-WindowedPanel-outer").first
    before = -1
    while (at := box.evaluate("o => o.scrollTop")) != before:
        before = at
        box.evaluate("o => { o.scrollTop += 800; }")
        page.wait_for_timeout(80)
    box.evaluate("o => { o.scrollTop = 0; }")
    page.wait_for_timeout(200)
    return page


def look_untrusted(
    page,  # An open notebook
    held: dict,  # What it holds
) -> list[str]:  # What is wrong
    "What a reader sees who has just downloaded the notebook."
    found = []
    if (seen := page.evaluate(figures)) != held["figures"]:
        found.append(f"{seen} of {held['figures']} figures are seen")
    said = page.locator(".jp-OutputArea-output .ftbook-still a:visible").count()
    if said != held["explorers"]:
        found.append(f"{said} of {held['explorers']} explorers say where they are alive")
    if page.locator("[data-ftbook-explorer]").count():
        found.append("the notebook is trusted")
    if dead := page.locator(".jp-OutputArea-output :is(input, select):visible").count():
        found.append(f"{dead} controls are shown that do nothing")
    return found


def look_trusted(
    page,  # An open notebook
    held: dict,  # What it holds
) -> tuple[list[str], int]:  # What is wrong, and how many controls were moved
    "What a reader sees who trusts the notebook and has not run it."
    found, moved = [], 0
    page.wait_for_timeout(500)
    explorers = page.locator("[data-ftbook-explorer]").all()
    if len(explorers) != held["explorers"]:
        found.append(f"{len(explorers)} of {held['explorers']} explorers are there")
    for n, explorer in enumerate(explorers):
        controls = explorer.locator("input, select").all()
        found += [f"explorer {n} has no controls"] * (not controls)
        found += [f"explorer {n} says that it is not alive"] * explorer.locator(".ftbook-still").count()
        found += [f"control {k} of explorer {n} moves nothing" for k, c in enumerate(controls) if not c.evaluate(move)]
        moved += len(controls)
    expected = held["figures"] - held["in_explorers"]
    if (seen := page.evaluate(figures)) != expected:
        found.append(f"{seen} of {expected} figures are seen")
    if views := page.locator('[data-mime-type="application/vnd.jupyter.widget-view+json"]').count():
        found.append(f"{views} widgets are looked for")
    if page.get_by_text(re.compile("model not found|Error displaying widget")).count():
        found.append("a widget is broken")
    return found, moved


def arrow_moves_slider(
    page,  # An open notebook that is trusted
) -> bool:  # True where there is no slider, too
    "An arrow key belongs to the slider that has the focus, not to the list of cells."
    slider = page.locator("[data-ftbook-explorer] input[type=range]").first
    if not slider.count():
        return True
    slider.scroll_into_view_if_needed()
    slider.click()
    before = slider.input_value()
    key = "ArrowLeft" if before == slider.get_attribute("max") else "ArrowRight"
    page.keyboard.press(key)
    cells = page.evaluate("() => document.activeElement.tagName")
    return slider.input_value() != before and cells == "INPUT"


def shoot(
    page,  # An open notebook
    folder: Path | None,  # Where pictures go
    name: str,  # Of the picture
) -> None:
    "Take a picture of the first figure, or explorer, with what is around it."
    if folder:
        output = page.locator(
            ".jp-OutputArea-output:has([data-ftbook-explorer]), .jp-OutputArea-output:has(.ftbook-still)"
        )
        target = output.first if output.count() else page.locator(".jp-OutputArea-output:has(img)").first
        target.scroll_into_view_if_needed()
        page.wait_for_timeout(300)
        page.screenshot(path=folder / f"{name}.png")


def main() -> None:
    "Open each notebook twice; exit 1 when a reader would miss something."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", help=f"default: {' '.join(usual)}")
    parser.add_argument(
        "--shots", type=Path, help="save a picture of each notebook, untrusted and trusted, in this folder"
    )
    args = parser.parse_args()
    paths = [Path(o).resolve() for o in args.notebooks] or [root / o for o in usual]
    if args.shots:
        args.shots.mkdir(parents=True, exist_ok=True)
    bad, chromium = 0, next(filter(None, map(shutil.which, browsers)), None)
    with tempfile.TemporaryDirectory() as tmp, sync_playwright() as play:
        folder = Path(tmp)
        for path in paths:
            shutil.copy(path, folder)
        process, home, env = start(folder)
        browser = play.chromium.launch(executable_path=chromium, args=flags)
        try:
            for path in paths:
                held, url = shown_in(path), f"{home}/lab/tree/{path.name}?reset"
                page = open_notebook(browser, url)
                faults = [f"untrusted: {o}" for o in look_untrusted(page, held)]
                shoot(page, args.shots, f"{path.stem}-untrusted")
                page.close()
                subprocess.run(
                    [sys.executable, "-m", "jupyter", "trust", folder / path.name],
                    env=env,
                    check=True,
                    capture_output=True,
                )
                page = open_notebook(browser, url)
                found, moved = look_trusted(page, held)
                found += ["an arrow key leaves the slider"] * (not arrow_moves_slider(page))
                faults += [f"trusted: {o}" for o in found]
                shoot(page, args.shots, f"{path.stem}-trusted")
                page.close()
                bad += bool(faults)
                told = f"{held['figures']} figures, {held['explorers']} explorers, {moved} controls"
                print(
                    f"{'FAIL' if faults else 'ok  '} {path.name}: {told}" + "".join(f"\n     {o}" for o in faults),
                    flush=True,
                )
        finally:
            browser.close()
            process.terminate()
            process.wait()
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
