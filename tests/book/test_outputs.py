"What the notebooks hold for a reader who does not run them."

import base64, hashlib, html, importlib.util, json, re, zlib

import pytest

from book import nbs, notebooks, root
from ftbook.show.bar_chart import bars
from ftbook.show.explorer import STILL, explore
from ftbook.show.images import as_drawings

VIEW = "application/vnd.jupyter.widget-view+json"

# Words that no output should print, each as the beginning of its SHA-256.
coarse = set(
    """
    044eb98b18 06a1d8bf7f 08a841e996 0c64f3ba82 0f28c4960d 11cf8376a1 120f6e5b4e 132f87c2e5 13a465fc66
    158869a973 16ea09fc78 17bde8b406 1837bc2c54 1ce99fbe33 1e02eec4f1 2447ae1911 245c20d383 26578569a2
    268651b3ec 2da888fb5e 2f5f6ce5ae 30a989afc8 31506a8448 341d56384a 402f7ebd98 41b4d5e856 45cd3e1bb4
    45fb7c3b72 517ae3f732 522788b65f 566f532d48 5a9d9dcefb 5b3ae48be1 63333e4b5d 665cb762e3 6ac3c336e4
    7bc671151c 7c4a5c242b 83621b34ec 85fc17f706 886d51e97a 89133bc00e 8f5083e3e5 92a9bf818e 937d56e497
    958ce5c321 986c990041 98b52c4b6b 9915ba2d82 9ae315a94e acd9193a33 b2a7d488cf b690cdbe59 b81d6dc258
    bb61ef4081 bdb1cc258d c1cabb6f6e c2c3b68b48 c3de533e9b d75a838dc7 d95b1fc785 dac40f30b6 dd92623b0a
    f1a5fb5607 f50c51ed23 f9d0d9b18a
    """.split()
)


def rules():
    "The script that keeps outputs clean."
    spec = importlib.util.spec_from_file_location("outputs", root / ".ci/outputs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rule = rules()
every_notebook = pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.relative_to(nbs).as_posix())


def texts_of(
    output: dict,  # Of a cell
) -> dict[str, str]:  # What it shows, by kind
    "Read an output."
    found = {k: "".join(v) if isinstance(v, list) else str(v) for k, v in output.get("data", {}).items()}
    return found | ({"stream": "".join(output["text"])} if "text" in output else {})


def faults(
    nb: dict,  # A notebook
) -> list[str]:  # What is wrong
    "Look for what a reader should not see."
    found = ["the states of widgets are saved"] * ("widgets" in nb["metadata"])
    for n, cell in enumerate(nb["cells"]):
        for kinds in map(texts_of, cell.get("outputs", [])):
            found += [f"cell {n} has the name of a widget"] * (VIEW in kinds)
            found += [f"cell {n} has a drawing that a sanitizer deletes"] * ("<svg" in kinds.get("text/html", ""))
            found += [f"cell {n} has a progress bar"] * any(rule.progress.search(t) for t in kinds.values())
            found += [f"cell {n} prints a coarse word"] * any(map(is_coarse, kinds.values()))
    return found


def is_coarse(
    text: str,  # What an output shows
) -> bool:  # Is one of the words in it?
    "Read an output, and the frames of an explorer with it."
    for packed in re.findall(r'data-frames="([^"]+)"', text):
        text += zlib.decompress(base64.b64decode(packed)).decode()
    text = re.sub(r'data-frames="[^"]+"|base64,[^"]+', "", html.unescape(text))
    words = {o.lower() for o in re.findall("[A-Za-z]{3,}", text)}
    return any(shortened(w) in coarse for w in words)


def shortened(
    word: str,  # In lower case
) -> str:  # As `coarse` has it
    "Hash a word."
    return hashlib.sha256(word.encode()).hexdigest()[:10]


@every_notebook
def test_outputs_are_fit_for_a_reader(path):
    assert not faults(json.loads(path.read_text(encoding="utf-8")))


@every_notebook
def test_the_rule_has_been_applied(path):
    text = path.read_text(encoding="utf-8")
    assert rule.clean_notebook(text, rule.page_of(path)) == text, "run `python .ci/outputs.py`"


def notebook(*outputs, **metadata):
    return dict(metadata=metadata, cells=[dict(cell_type="code", outputs=list(outputs))])


bad = {
    "the states of widgets": notebook(widgets={}),
    "the name of a widget": notebook(dict(data={VIEW: {}, "text/html": ["x"]})),
    "a drawing": notebook(dict(data={"text/html": [bars({"a": 1.0}).html]})),
    "a progress bar": notebook(dict(text=["Writing model shards:   0%|          | 0/1 [00:00<?, ?it/s]\n", "done\n"])),
}


@pytest.mark.parametrize("fault", bad)
def test_each_fault_is_found_and_mended(fault):
    nb = bad[fault]
    assert [o for o in faults(nb) if fault in o]
    clean = json.loads(rule.clean_notebook(json.dumps(nb), "https://site/page.html"))
    assert not faults(clean)


def test_a_coarse_word_is_found_in_text_and_in_a_frame():
    word = "umbrella"
    coarse.add(shortened(word))
    assert faults(notebook(dict(text=[f"you {word.upper()}!"]))) == ["cell 0 prints a coarse word"]
    hidden = explore(lambda k: k, lambda k: bars({k: 1.0}), k=["polite", word])
    assert faults(notebook(dict(data={"text/html": [hidden.html]}))) == ["cell 0 prints a coarse word"]
    assert not faults(notebook(dict(text=["what an assistant passes on"])))
    coarse.remove(shortened(word))


def test_what_is_left_of_an_output():
    "A bar alone goes, words beside it stay, a widget with no HTML goes, and a drawing can be taken out again."
    bar = "tune:  67%|######6   | 30/45 [00:10<00:05,  2.95step/s]"
    chart = bars({"a": 1.0}).html
    outputs = [
        dict(text=[bar]),
        dict(text=[bar + "\n", "1.5 s/step\n"]),
        dict(data={VIEW: {}, "text/plain": [bar]}),
        dict(data={"text/html": [chart]}),
    ]
    [cell] = json.loads(rule.clean_notebook(json.dumps(notebook(*outputs)), ""))["cells"]
    words, drawn = cell["outputs"]
    assert words == dict(text=["1.5 s/step\n"]) and as_drawings("".join(drawn["data"]["text/html"])) == chart


def test_an_explorer_says_where_its_page_is():
    page = rule.page_of(nbs / "16_memory.ipynb")
    assert page.endswith("/memory.html") and page.startswith("https://")
    html = rule.clean_html(f"<div>{STILL}</div>", page)
    assert f'<a href="{page}">' in html and html.count("ftbook-still") == 1
    assert rule.clean_html(html, page) == html
