"The worked example of CONTRIBUTING.md runs as it stands."

import re

from book import root
from ftbook.methods.protocol import METHODS


def test_the_method_of_the_guide_works():
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert len(blocks) == 3 and "assert" in blocks[2]
    space = {"__name__": "guide"}
    try:
        for block in blocks:
            exec(compile(block, "CONTRIBUTING.md", "exec"), space)
    finally:
        METHODS.pop("OUTPUT_SCALE", None)
    assert not space["again"].training


def test_the_guide_leads_somewhere():
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    gone = [o for o in re.findall(r"\]\((?!http)([^)#]+)\)", text) if not (root / o).exists()]
    assert not gone
