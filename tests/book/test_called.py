"Every public function and method is called by a check that can fail; `.ci/mutate.py` asks whether it does fail."

import ast

import pytest

from called import Flow, checked, public


def test_every_public_name_is_checked():
    missing = public().things.keys() - checked().keys()
    assert not missing, f"no page and no test asserts anything of {', '.join(sorted(missing))}"


@pytest.mark.parametrize(
    "code, what",
    [
        ("assert pack(examples)", {"pack"}),
        ("packs = pack(examples)\nn = len(packs)\nassert n == 3", {"pack"}),
        ("def f(x):\n    return pack(x)\nassert f(1)", {"pack"}),
        ("def check(x):\n    assert x\ncheck(pack(1))", {"pack"}),
        ("with pytest.raises(ValueError):\n    pack([])", {"pack"}),
        ("merge_(model)\nassert model.weight", {"merge_"}),
        ("loop = Loop(model)\nloop.take_step()\nassert loop.step", {"Loop", "Loop.take_step"}),
        ("test_eq([len(p) for p in pack(examples)], [3])", {"pack"}),
    ],
)
def test_what_an_assertion_depends_on(code, what):
    flow = Flow()
    flow.body(ast.parse(code).body)
    assert flow.checked & public().things.keys() >= what


@pytest.mark.parametrize(
    "code",
    [
        "pack(examples)",
        "packs = pack(examples)\nprint(packs)\nassert True",
        "packs = pack(examples)\npacks = 3\nassert packs == 3",
        "plan = dict()\nassert other.pack_size == 3",
        "def f(x):\n    return pack(x)\nassert 1",
        "assert thing.take_step() and name.apply(3)",
    ],
)
def test_what_no_assertion_depends_on(code):
    flow = Flow()
    flow.body(ast.parse(code).body)
    assert not flow.checked & public().things.keys()
