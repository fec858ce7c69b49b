"""Open every page of the built site in headless Chromium, and fail on anything a reader would call broken.

A page must log no error and load nothing that is missing. Hosts outside are blocked, so a page that needs one shows it.
Every control of every explorer is moved, and its figure must follow. Pictures must be readable when the page's own
button makes it dark on a light system, and light on a dark one.
"""

import argparse, base64, functools, http.server, shutil, sys, tempfile, threading
from pathlib import Path

from playwright.sync_api import sync_playwright

flags = """--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync
    --disable-quic --no-first-run --disable-dev-shm-usage""".split()

browsers = "chromium", "chromium-browser", "google-chrome"

# Moves one control through its values, and says whether the explorer's picture ever changed. A picture may take a moment.
move = """async control => {
  const explorer = control.closest('[data-ftbook-explorer]');
  const look = () => (explorer.querySelector('[data-ftbook-figure]') || explorer).innerHTML;
  const before = look(), was = control.value;
  const changes = async () => {
    for (let wait = 0; wait < 40; wait++) { if (look() !== before) return true; await new Promise(o => setTimeout(o, 25)); }
    return false;
  };
  if (control.type === 'checkbox' || control.type === 'radio') {
    if (control.type === 'radio' && control.checked) return true;
    control.click(); const changed = await changes();
    if (control.type === 'checkbox') control.click();
    return changed;
  }
  const put = v => { control.value = v; ['input', 'change'].forEach(o => control.dispatchEvent(new Event(o, {bubbles: true}))); };
  const values = control.tagName === 'SELECT' ? [...control.options].map(o => o.value) : [control.max, control.min];
  let changed = false;
  for (const v of values) if (!changed && v !== was) { put(v); changed = await changes(); }
  put(was);
  return changed;
}"""

# What the two checks of contrast share: the luminance of a colour, and the contrast of two.
light = """
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const rgb = c => { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b; };
  const contrast = (a, b) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
"""

is_dark = "() => {" + light + "return light(rgb(getComputedStyle(document.body).backgroundColor)) < .2}"

# The texts of inline drawings that are hard to tell from what the page has behind them.
faint_texts = (
    "() => {"
    + light
    + """
  const paper = e => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor; if (c !== 'rgba(0, 0, 0, 0)' && c !== 'transparent') return c; }
    return '#fff'; };
  return [...document.querySelectorAll('main svg[role=img] text')].filter(t => t.textContent.trim() && contrast(
    light(rgb(getComputedStyle(t).fill)), light(rgb(paper(t.closest('svg[role=img]').parentElement)))) < 3)
    .map(t => t.textContent.trim()); }"""
)

# The most that any pixel of a picture stands out from the colour that most of its pixels have.
most_contrast = (
    "async png => {"
    + light
    + """
  const bitmap = await createImageBitmap(await (await fetch('data:image/png;base64,' + png)).blob());
  const sheet = new OffscreenCanvas(bitmap.width, bitmap.height).getContext('2d');
  sheet.drawImage(bitmap, 0, 0);
  const all = sheet.getImageData(0, 0, bitmap.width, bitmap.height).data, seen = new Map();
  for (let i = 0; i < all.length; i += 4) { const k = (all[i] << 16) + (all[i + 1] << 8) + all[i + 2];
    seen.set(k, (seen.get(k) || 0) + 1); }
  const of = k => light([k >> 16, k >> 8 & 255, k & 255]);
  const most = of([...seen].reduce((a, b) => b[1] > a[1] ? b : a)[0]);
  return Math.max(...[...seen.keys()].map(k => contrast(of(k), most))); }"""
)


class Quiet(http.server.SimpleHTTPRequestHandler):
    "Serves files without a line for each."

    def log_message(self, *args):
        pass


def serve(
    folder: Path,  # The built site
) -> str:  # Its address
    "Serve the site on the loopback, on a free port."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def unreadable(
    page,  # An open page
    home: str,  # The site's address
) -> list[str]:  # What cannot be read
    "Look at the pictures as the page shows them now."
    found = [f"the text {t!r} of a drawing is hard to see" for t in page.evaluate(faint_texts)[:3]]
    for image in page.locator(f'main img[src^="data:"], main img[src^="{home}"], main img:not([src*=":"])').all():
        contrast = page.evaluate(most_contrast, base64.b64encode(image.screenshot()).decode())
        if contrast < 4.5:
            found.append(f"the picture {image.get_attribute('alt')!r} is hard to see: a contrast of {contrast:.1f}")
    return found


def press(
    page,  # An open page, on the system that `system` names
    home: str,  # The site's address
    system: str,  # "light" or "dark"
) -> list[str]:  # Pictures that cannot be read, in either combination
    "Choose by the page's button what the system is not, on a light and on a dark system."
    button = page.locator(".quarto-color-scheme-toggle").first
    if not page.locator("main svg[role=img], main img").count() or not button.count():
        return []
    found, other = [], dict(light="dark", dark="light")
    for now in (system, other[system]):
        page.emulate_media(color_scheme=now)
        button.evaluate("o => o.click()")
        page.wait_for_function(f"({is_dark})() === {str(now == 'light').lower()}", timeout=5000)
        found += [f"{other[now]} by the button on a {now} system: {o}" for o in unreadable(page, home)]
    page.emulate_media(color_scheme=system)
    page.evaluate("localStorage.removeItem('smalldocs-scheme')")
    return found


def visit(
    page,  # A fresh browser page
    home: str,  # The site's address
    name: str,  # The page to open, relative to the site
    shots: Path | None,  # Where to put a picture of it
    system: str,  # What the browser asks for: "light" or "dark"
) -> tuple[list[str], int]:  # What is wrong with it, and how many controls were moved
    "Open one page, move what can be moved, and collect complaints."
    faults = []
    outside = lambda url: url.startswith(("http:", "https:")) and not url.startswith(home)

    def on_console(msg):
        if msg.type == "error" and not outside((msg.location or {}).get("url", "")):
            faults.append(f"console: {msg.text}")

    page.route("**/*", lambda route: route.abort() if outside(route.request.url) else route.continue_())
    page.on("console", on_console)
    page.on("pageerror", lambda e: faults.append(f"script: {e}"))
    page.on("requestfailed", lambda r: None if outside(r.url) else faults.append(f"failed: {r.url} {r.failure}"))
    page.on(
        "request",
        lambda r: (
            faults.append(f"needs the network: {r.url}") if outside(r.url) and r.resource_type != "image" else None
        ),
    )
    page.on("response", lambda r: faults.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    page.goto(f"{home}/{name}", wait_until="load")
    if not page.title() or not page.locator("main h1, #title-block-header h1").count():
        faults.append("no title")
    if page.get_by_text("\\(", exact=False).count() + page.get_by_text("\\[", exact=False).count():
        faults += [f"formula left as TeX: {t[:60]}" for t in page.locator("span.math").all_text_contents() if "\\" in t]
    controls = page.locator("[data-ftbook-explorer] input, [data-ftbook-explorer] select").all()
    for n, control in enumerate(controls):
        if not control.evaluate(move):
            faults.append(
                f"control {n} ({control.get_attribute('aria-label') or control.get_attribute('name')}) moves nothing"
            )
    if shots:
        page.screenshot(path=shots / (name.replace("/", "-").removesuffix(".html") + ".png"), full_page=True)
    faults += press(page, home, system)
    page.set_viewport_size({"width": 390, "height": 800})
    page.reload(wait_until="load")
    wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    if wide > 1:
        faults.append(f"on a phone the page is {wide} pixels too wide")
    if shots:
        page.screenshot(path=shots / (name.replace("/", "-").removesuffix(".html") + "-phone.png"))
    return faults, len(controls)


def main() -> None:
    "Visit every page of the site; exit 1 when any is broken."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", nargs="?", type=Path, default=Path(__file__).resolve().parent.parent / "_docs")
    parser.add_argument("--shots", type=Path, help="save a picture of every page in this folder")
    parser.add_argument("--dark", action="store_true", help="look at the site in dark mode")
    parser.add_argument(
        "--chromium",
        default=next(filter(None, map(shutil.which, browsers)), None),
        help="the browser to use; else one that `playwright install chromium` brought",
    )
    args = parser.parse_args()
    names = sorted(p.relative_to(args.site).as_posix() for p in args.site.rglob("*.html"))
    names = [n for n in names if not n.startswith("site_libs/")]
    if not names:
        sys.exit(f"{args.site} holds no pages: run .ci/site.py first")
    if args.shots:
        args.shots.mkdir(parents=True, exist_ok=True)
    home, bad, moved = serve(args.site), 0, 0
    system = "dark" if args.dark else "light"
    with sync_playwright() as play, tempfile.TemporaryDirectory() as profile:
        browser = play.chromium.launch_persistent_context(
            profile,
            executable_path=args.chromium,
            headless=True,
            args=flags,
            color_scheme=system,
            viewport={"width": 1280, "height": 900},
        )
        for name in names:
            page = browser.new_page()
            page.set_viewport_size({"width": 1280, "height": 900})
            faults, n = visit(page, home, name, args.shots, system)
            page.close()
            moved, bad = moved + n, bad + bool(faults)
            print(
                f"{'FAIL' if faults else 'ok  '} {name}"
                + (f"  ({n} controls)" if n else "")
                + "".join(f"\n     {f}" for f in faults)
            )
        browser.close()
    print(f"{len(names)} pages, {moved} controls moved, {bad} pages broken")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
