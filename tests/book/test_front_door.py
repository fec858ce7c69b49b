"The front door: `import ftbook as ft` is light, and each of its names is there, in a fresh process too."

import ast, importlib, subprocess, sys

import pytest

import ftbook
from book import lib, root

stub = ast.parse((lib / "__init__.pyi").read_text(encoding="utf-8"))
names = {a.asname: o.module for o in stub.body if isinstance(o, ast.ImportFrom) for a in o.names}


def test_the_names_are_those_of_the_stub():
    assert set(ftbook.__all__) == set(names) and set(names) <= set(dir(ftbook))
    assert 25 <= len(names) <= 40


@pytest.mark.parametrize("name", names)
def test_a_name_is_what_its_module_has(name):
    module = importlib.import_module(f"ftbook.{names[name]}")
    assert getattr(ftbook, name) is getattr(module, name)
    assert name in module.__all__, "what is at the front door is public where it lives"


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="fine_tune"):
        ftbook.fine_tune


def test_nothing_heavy_comes_with_the_door():
    code = "import sys, ftbook; dir(ftbook); print({'torch', 'transformers', 'numpy', 'yaml'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "set()", done.stderr


LINES = """
model, tokenizer = ft.load_model('smollm2-135m', dtype='float32', device='cpu')
rows = ft.read_rows('reviews.csv')
ft.LoRA(rank=2, target_modules=['q_proj']).apply(model)
ft.finetune(model, rows, tokenizer=tokenizer, eval_rows=0.1, max_steps=1, progress=False)
ft.evaluate(model, rows, tokenizer=tokenizer)
ft.chat(model, tokenizer, max_new_tokens=2).ask('Is it good?')
ft.save_adapter(model, 'adapter')
ft.load_adapter(ft.load_model('smollm2-135m', dtype='float32', device='cpu')[0], 'adapter')
ft.export('adapter', 'merged', format='safetensors', base='smollm2-135m')
ft.audit('reviews.csv', encoder=None, progress=False)
ft.plan('Llama-3.1-8B', ft.LoRA(), quantize='nf4')
ft.FewShotClassifier(tuning=None).fit(['good film', 'fine film', 'bad film', 'dull film'], list('aabb')).predict(['a film'])
"""


def test_the_lines_of_the_front_page_run_in_a_fresh_process(tmp_path):
    rows = "".join(
        f"the film number {i} was {'fine' if i % 2 else 'dull'},{'good' if i % 2 else 'bad'}\n" for i in range(24)
    )
    (tmp_path / "reviews.csv").write_text("text,label\n" + rows)
    done = subprocess.run(
        [sys.executable, "-c", "import ftbook as ft" + LINES], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
