"The merging engine: files against memory, pieces, plans, vocabularies, adapters."

import json, os, shutil, subprocess, sys

import numpy as np
import pytest, torch, yaml
from safetensors.torch import save_file

from book import root
from ftbook.merging import checkpoints as merging_checkpoints
from ftbook.merging import parts as merging_parts
from ftbook.merging import write as merging_write
from ftbook.merging.recipes import RECIPES
from ftbook.merging.checkpoints import INDEX, MODEL, read_header
from ftbook.merging.engine import merge
from ftbook.merging.adapters import merge_adapters
from ftbook.merging.states import merge_states
from ftbook.merging.plan import plan_merge
from ftbook.merging.config import value_at
from studies.merge_parity import QUESTIONS
from cases.merge import adapter, gap, llama, models, NAMES, recipe_for, source, tensors, words


# The engine


def test_files_equal_memory(source, tmp_path):
    s = {n: tensors(source / n) for n in NAMES}
    for method in ("linear", "ties", "dare_ties", "della", "ties_paper", "model_stock"):
        p = {k: v for k, v in dict(density=0.5).items() if k in RECIPES[method].each}
        c = recipe_for(source, method, base="base" if RECIPES[method].base else None, **p)
        done = merge(c, tmp_path / method, seed=5)
        want = merge_states(
            method,
            s["base"] if RECIPES[method].base else None,
            [s[n] for n in NAMES[1:]],
            seed=5,
            **({"weight": 1.0} if "weight" in RECIPES[method].each else {}),
            **p,
        )
        got = tensors(done.folder)
        # streams are named after models' paths
        if method in ("dare_ties", "della"):
            assert got.keys() == want.keys() and all(t.shape == want[k].shape for k, t in got.items())
        else:
            assert gap(got, want) < 1e-6


@pytest.mark.parametrize("method", ["ties", "dare_ties", "ties_paper", "sce"])
def test_threads_shards_and_pieces_do_not_matter(source, tmp_path, method, monkeypatch):
    c = recipe_for(source, method, **({"density": 0.4} if "density" in RECIPES[method].each else {}))
    one = tensors(merge(c, tmp_path / "one", threads=1).folder)
    monkeypatch.setattr(merging_parts, "CHUNK", 512)
    done = merge(c, tmp_path / "many", threads=4, shard=20_000)
    assert len(list(done.folder.glob("*.safetensors"))) > 3 and gap(tensors(done.folder), one) < 1e-6


def test_what_is_written(source, tmp_path):
    from transformers import AutoModelForCausalLM

    shutil.copytree(source, tmp_path / "m")
    (tmp_path / "m" / "base" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "m" / "base" / "generation_config.json").write_text('{"temperature": 0.5}')
    done = merge(recipe_for(tmp_path / "m", density=0.5, dtype="bfloat16"), tmp_path / "out", shard=30_000)
    model, info = AutoModelForCausalLM.from_pretrained(done.folder, output_loading_info=True)
    assert (
        model.dtype == torch.bfloat16
        and not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        and model.lm_head.weight is model.model.embed_tokens.weight
    )
    card = (done.folder / "README.md").read_text()
    assert (
        all(len(h) == 64 and h in card for h in done.hashes.values())
        and "merge_method: ties" in card
        and "torch" in card
        and str(done.plan.models[0].name) in card
    )
    assert (done.folder / "chat_template.jinja").read_text() == "{{ messages }}" and (
        done.folder / "generation_config.json"
    ).is_file()
    assert sorted(f.name for f in done.folder.iterdir() if f.suffix in (".txt", ".merging")) == [] and not list(
        tmp_path.glob(".*")
    )
    assert {k: v["weight_map"] for k, v in [("x", json.loads((done.folder / INDEX).read_text()))]}[
        "x"
    ].keys() == tensors(done.folder).keys()
    for f in done.folder.glob("*.safetensors"):
        assert all(t.offset % 2 == 0 for t in read_header(f).values())


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="only Linux tells a process its own peak")
def test_memory_does_not_grow_with_the_models(tmp_path):
    "The same merge of models of 16 and of 128 MB, in processes of their own."

    def peak(n):
        folder = tmp_path / str(n)
        for i, name in enumerate(NAMES):
            (folder / name).mkdir(parents=True)
            g = torch.Generator().manual_seed(i)
            save_file(
                {f"layers.{j}.w": torch.randn(1024, 1024, generator=g).bfloat16() for j in range(n)},
                folder / name / MODEL,
            )
        (folder / "c.yml").write_text(yaml.safe_dump(recipe_for(folder, density=0.3)))
        code = (
            f"from ftbook.merging.engine import merge; merge({str(folder / 'c.yml')!r}, {str(folder / 'out')!r}, "
            "threads=2, hashes=False); print(next(l for l in open('/proc/self/status') if "
            "l.startswith('VmHWM')).split()[1])"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout) / 1024

    small, large = peak(8), peak(64)
    assert large - small < 24, (small, large)


def test_plan_says_what_it_will_do(source):
    plan = plan_merge(recipe_for(source, density=0.5))
    assert plan.bytes_read == sum(f.stat().st_size for n in NAMES for f in (source / n).glob("*.safetensors"))
    assert plan.bytes_written == sum(t.numel() * 4 for t in tensors(source / "base").values())
    assert 0 < plan.seconds(1) < 60 and plan.buffers(2) > plan.buffers(1) > 0
    assert "ties: 29 tensors of 4 models" in str(plan)


def test_printing_a_plan_times_nothing(source, monkeypatch):
    plan = plan_merge(recipe_for(source, density=0.5))
    monkeypatch.setattr(type(plan), "seconds", lambda *a: pytest.fail("a merge was timed"))
    assert repr(plan) == repr(plan)


def test_a_flag_that_another_thread_sets_is_kept(source, tmp_path, monkeypatch):
    "While one thread looks at the second model's piece, another one finds that the first model moved."
    plan, flags = plan_merge(recipe_for(source, "task_arithmetic", names=("red", "blue"))), []

    class Still:
        def any(self):
            return False

    class Meanwhile:
        def any(self):
            flags[0][0] = True
            return True

    def make(plan, job, file, spread, moved):
        flags[:] = [moved]
        return real(plan, job, file, spread, moved)

    real = merging_write._make
    monkeypatch.setattr(merging_write, "_make", make)
    monkeypatch.setattr(merging_parts.Parts, "deltas", lambda *a: [Still(), Meanwhile()])
    assert not merge(plan, tmp_path / "out", threads=1, hashes=False).notes


# Configurations


def test_settings():
    assert value_at([1, 2, 4], "w", 0.75) == 3 and value_at([5], "w", 0.3) == 5 and value_at(["a", "b"], "w", 1) == "b"
    assert value_at([dict(filter="mlp", value=1)], "attn", 0) is None and value_at(dict(value=[0, 1]), "w", 0.5) == 0.5
    assert value_at([True, False], "w", 0.4) is True


def test_nearest_setting_counts(source):
    c = recipe_for(source, "task_arithmetic", parameters=dict(weight=9, **{"lambda": 0.5}))
    del c["models"][1]["parameters"]["weight"]
    jobs = plan_merge(c).jobs
    assert all(j.p.weight == [1.0, 9, 1.0] and j.p.scale == 0.5 for j in jobs)


def test_gradients_over_depth(source):
    jobs = {
        j.name: j.p.weight
        for j in plan_merge(
            recipe_for(source, "linear", base=None, weight=[0, 1]) | {"parameters": dict(normalize=False)}
        ).jobs
    }
    assert [jobs[f"model.layers.{i}.mlp.up_proj.weight"][0] for i in range(3)] == [0, 0.5, 1] and jobs[
        "model.norm.weight"
    ] == [0] * 3


# Vocabularies and tied heads


def test_union_of_tokens(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = [f"w{i}" for i in range(90)]
    for i, (name, extra) in enumerate((("base", []), ("red", ["<x>"]), ("blue", ["<y>", "<x>"]))):
        llama(i, vocab_size=90 + len(extra)).save_pretrained(tmp_path / name)
        words(tmp_path / name, plain, extra)
    c = recipe_for(tmp_path, "task_arithmetic", NAMES[1:3])
    with pytest.raises(ValueError, match="numbers its tokens otherwise|tokenizer_source: union"):
        plan_merge(c)
    done = merge(c | dict(tokenizer_source="union"), tmp_path / "out")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(done.folder), AutoTokenizer.from_pretrained(done.folder)
    vocab = tokenizer.get_vocab()
    assert len(vocab) == 92 and all(vocab[t] == i for i, t in enumerate(plain)) and model.config.vocab_size == 92
    rows = {n: tensors(tmp_path / n)["model.embed_tokens.weight"] for n in NAMES[:3]}
    got, x, y = model.get_input_embeddings().weight, vocab["<x>"], vocab["<y>"]
    # the base lacks <x>, and two models have it
    mean = (rows["red"][90] + rows["blue"][91]) / 2
    torch.testing.assert_close(got[x], rows["red"][90] + rows["blue"][91] - mean)
    torch.testing.assert_close(got[y], rows["blue"][90])  # only one has <y>
    torch.testing.assert_close(got[5], rows["red"][5] + rows["blue"][5] - rows["base"][5])


def test_tokens_of_the_base_and_padding(tmp_path):
    plain = [f"w{i}" for i in range(90)]
    for i, (name, extra) in enumerate((("base", []), ("red", ["<x>"]))):
        llama(i, vocab_size=90 + len(extra)).save_pretrained(tmp_path / name)
        words(tmp_path / name, plain, extra)
    c = recipe_for(tmp_path, "task_arithmetic", NAMES[1:2])
    merge(c | dict(tokenizer_source="base"), tmp_path / "out")
    assert tensors(tmp_path / "out")["model.embed_tokens.weight"].shape == (90, 32)
    merge(c | dict(tokenizer=dict(source="union", pad_to_multiple_of=32)), tmp_path / "padded")
    rows = tensors(tmp_path / "padded")["model.embed_tokens.weight"]
    red = tensors(tmp_path / "red")["model.embed_tokens.weight"]
    assert rows.shape == (96, 32)
    torch.testing.assert_close(rows[:91], red)
    torch.testing.assert_close(rows[91:], red.mean(0).expand(5, 32), atol=1e-6, rtol=0)


def test_a_copied_head_stays_tied(models, tmp_path):
    t = tensors(models / "red")
    save_file(t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()}, models / "red" / MODEL)
    made = tensors(merge(recipe_for(models, density=0.5), tmp_path / "out").folder)
    assert "lm_head.weight" not in made
    save_file(t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1}, models / "red" / MODEL)
    with pytest.raises(ValueError, match="has an output head of its own"):
        plan_merge(recipe_for(models))


def test_untied_heads_are_merged(tmp_path):
    for i, n in enumerate(NAMES[:3]):
        llama(i, tie_word_embeddings=False).save_pretrained(tmp_path / n)
    made = tensors(merge(recipe_for(tmp_path, "linear", NAMES[1:3], None), tmp_path / "out").folder)
    torch.testing.assert_close(
        made["lm_head.weight"], sum(tensors(tmp_path / n)["lm_head.weight"] for n in NAMES[1:3]) / 2
    )


# Adapters


@pytest.mark.parametrize(
    "options",
    [{}, dict(use_rslora=True), dict(rank_pattern={"q_proj": 6}, alpha_pattern={"down_proj": 11})],
    ids=["plain", "rslora", "patterns"],
)
def test_an_adapter_on_a_base(source, tmp_path, options):
    want = adapter(tmp_path / "a", llama(0), 1, **options).merge_and_unload().state_dict()
    for name in (f"{source / 'base'}+{tmp_path / 'a'}", str(tmp_path / "a")):
        c = dict(
            merge_method="task_arithmetic",
            base_model=str(source / "base"),
            models=[dict(model=name, parameters=dict(weight=1.0))],
        )
        made = tensors(merge(c, tmp_path / f"out{len(name)}").folder)
        assert gap(made, want) < 1e-6 and gap(made, tensors(source / "base")) > 0.01


def test_an_adapter_of_gpt2(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    made = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=80, n_positions=32))
    made.save_pretrained(tmp_path / "base")
    want = (
        adapter(tmp_path / "a", made, 1, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
        .merge_and_unload()
        .state_dict()
    )
    merge(
        dict(
            merge_method="task_arithmetic",
            base_model=str(tmp_path / "base"),
            models=[dict(model=f"{tmp_path / 'base'}+{tmp_path / 'a'}", parameters=dict(weight=1.0))],
        ),
        tmp_path / "out",
    )
    assert gap(tensors(tmp_path / "out"), {k: v for k, v in want.items()}) < 1e-6


def test_adapters_with_each_other(source, tmp_path):
    import peft

    ids, deltas = torch.arange(20)[None], []
    for seed, w in ((1, 0.7), (2, -0.4)):
        merged = adapter(tmp_path / f"a{seed}", llama(0), seed, r=2 + seed).merge_and_unload().state_dict()
        deltas.append(
            {k: w * (t - tensors(source / "base")[k]) for k, t in merged.items() if k in tensors(source / "base")}
        )
    lost = merge_adapters({tmp_path / "a1": 0.7, tmp_path / "a2": -0.4}, tmp_path / "sum")
    assert max(lost.values()) == 0
    model = peft.PeftModel.from_pretrained(llama(0), tmp_path / "sum")
    want = llama(0)
    with torch.no_grad():
        for k, p in want.named_parameters():
            p.add_(sum(d[k] for d in deltas))
        torch.testing.assert_close(model(ids).logits, want(ids).logits, atol=1e-4, rtol=0)
    lost = merge_adapters({tmp_path / "a1": 0.7, tmp_path / "a2": -0.4}, tmp_path / "small", rank=3)
    for module, (s, a, b, _) in merging_checkpoints.adapter_products(tmp_path / "small").items():
        whole = sum(d[f"{module}.weight"] for d in deltas)
        values = torch.linalg.svdvals(whole)
        assert len(a) == 3 and abs(lost[module] - float(values[3:].norm() / values.norm())) < 1e-4
        assert abs(float((s * (b @ a) - whole).norm() / whole.norm()) - lost[module]) < 1e-4


def test_recipes_on_adapters(tmp_path):
    for seed in (1, 2):
        adapter(tmp_path / f"a{seed}", llama(0), seed)
    merge_adapters({tmp_path / "a1": 1.0, tmp_path / "a2": 1.0}, tmp_path / "ties", method="ties", density=0.3)
    p = [merging_checkpoints.adapter_products(tmp_path / f"a{i}") for i in (1, 2)]
    for module, (s, a, b, _) in merging_checkpoints.adapter_products(tmp_path / "ties").items():
        dense = [{"w": x[module][0] * (x[module][2] @ x[module][1])} for x in p]
        want = merge_states("ties", {"w": torch.zeros_like(dense[0]["w"])}, dense, weight=1.0, density=0.3)["w"]
        torch.testing.assert_close(s * (b @ a), want, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="rank=0"):
        merge_adapters({tmp_path / "a1": 1.0}, tmp_path / "x", rank=0)


# Bad input


def test_merging_needs_no_torch():
    "What makes a merge start quickly."
    done = subprocess.run(
        [sys.executable, "-c", "import sys, ftbook.merging.engine; print('torch' in sys.modules)"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("kind", ["BF16", "F16", "F32"])
def test_stored_numbers(kind):
    "Rounding as PyTorch has it, and every number back."
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[kind]
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(2)) * torch.logspace(-6, 4, 100_000)
    x = torch.cat(
        [
            x,
            (torch.arange(4096, dtype=torch.int32) * 0x8000 + 0x3F000000).view(torch.float32),
            torch.tensor([0.0, -0.0, 1e-40, -1e-45]),
        ]
    )
    out = np.empty(len(x), np.float32)
    stored = merging_checkpoints.narrow(x.numpy().copy(), kind)
    merging_checkpoints.widen_(out, stored, kind)
    assert np.array_equal(out, x.to(dtype).float().numpy())


# mergekit


def test_every_method_of_mergekit_that_is_here_is_compared():
    asked = {c["merge_method"] for c in QUESTIONS.values()}
    assert asked == {n for n in RECIPES if not n.endswith("_paper")}
