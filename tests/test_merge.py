"Merging: every recipe against plain torch, the engine against memory, configurations, vocabularies, adapters, bad input, and mergekit."

import errno, json, math, os, shutil, subprocess, sys

import numpy as np
import pytest, torch, yaml
from safetensors.torch import load_file, save_file

from book import nbs, root
from ftbook.merging import chance as merging_chance
from ftbook.merging import checkpoints as merging_checkpoints
from ftbook.merging import config as merging_config
from ftbook.merging import parts as merging_parts
from ftbook.merging import recipes as merging_recipes
from ftbook.merging import states as merging_states
from ftbook.merging import write as merging_write
from ftbook.merging.recipes import RECIPES
from ftbook.merging.checkpoints import INDEX, MODEL, read_header
from ftbook.merging.chance import coins
from ftbook.merging.vectors import conflicts
from ftbook.merging.threshold import kth_largest
from ftbook.merging.engine import merge
from ftbook.merging.adapters import merge_adapters
from ftbook.merging.states import merge_states
from ftbook.merging.plan import plan_merge
from ftbook.merging.config import read_config, value_at
from ftbook.merging.search import search

NAMES = "base", "red", "blue", "green"


# Small models


def config(**kw):
    from transformers import LlamaConfig

    return LlamaConfig(
        **dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=90,
            tie_word_embeddings=True,
            initializer_range=0.1,
        )
        | kw
    )


def llama(seed, **kw):
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model, g = LlamaForCausalLM(config(**kw)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * bool(seed) * torch.randn(p.shape, generator=g))
    return model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    "Four models; one of them is sharded."
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(NAMES):
        llama(seed).save_pretrained(folder / name, max_shard_size="50KB" if name == "blue" else "1GB")
    return folder


@pytest.fixture
def models(source, tmp_path):
    "A copy that a test may spoil."
    shutil.copytree(source, tmp_path / "m")
    return tmp_path / "m"


def tensors(folder):
    return {k: t for f in folder.glob("*.safetensors") for k, t in load_file(f).items()}


def recipe_for(folder, method="ties", names=NAMES[1:], base="base", **kw):
    "A configuration; keywords beside the known top level are parameters of every model."
    top = {k: kw.pop(k) for k in list(kw) if k in merging_config._TOP}
    given = {"weight": 1.0} | kw if "weight" in RECIPES[method].each else kw
    return (
        dict(
            merge_method=method,
            models=[dict(model=str(folder / n), parameters=dict(given)) for n in names],
            **({"base_model": str(folder / base)} if base else {}),
            dtype="float32",
        )
        | top
    )


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[k]) for k, t in a.items())


def gap(a, b):
    return max(float((t - b[k]).abs().max()) for k, t in a.items())


# Recipes against plain torch


def stack(n=700, k=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(n, generator=g)
    return base, [base + 0.1 * torch.randn(n, generator=g) for _ in range(k)]


def run(method, base, models, **kw):
    return merge_states(method, None if base is None else {"w": base}, [{"w": m} for m in models], **kw)["w"]


def keep_top(d, density):
    out = torch.zeros_like(d)
    index = d.abs().argsort(descending=True)[: max(1, int(density * d.numel()))]
    out[index] = d[index]
    return out


def test_linear_and_arithmetic():
    base, m = stack()
    torch.testing.assert_close(run("linear", None, m, weight=[1.0, 2.0, 3.0]), (m[0] + 2 * m[1] + 3 * m[2]) / 6)
    torch.testing.assert_close(
        run("linear", None, m, weight=[1.0, 2.0, 3.0], normalize=False), m[0] + 2 * m[1] + 3 * m[2]
    )
    torch.testing.assert_close(
        run("task_arithmetic", base, m, weight=[1.0, -2.0, 0.5], scale=0.3),
        base + 0.3 * ((m[0] - base) - 2 * (m[1] - base) + 0.5 * (m[2] - base)),
    )


def test_slerp_keeps_length_and_angle():
    a, b = (
        torch.nn.functional.normalize(t, dim=0) * 3
        for t in torch.randn(2, 500, generator=torch.Generator().manual_seed(1))
    )
    angle = torch.arccos((a @ b) / 9)
    for t in (0.0, 0.25, 1.0):
        c = run("slerp", a, [b], t=t)
        torch.testing.assert_close(c.norm(), torch.tensor(3.0))
        torch.testing.assert_close(torch.arccos(((a @ c) / 9).clamp(-1, 1)), t * angle, atol=2e-3, rtol=0)
    torch.testing.assert_close(run("slerp", a, [a * 1.5], t=0.5), a * 1.25)


@pytest.mark.parametrize(
    "normalize, w",
    [(n, w) for n in (True, False) for w in ([1.0, 0.5, 0.7], [0.5] * 3, [2] * 3, [-0.5] * 3, [1.0, -1.0, 0.5])],
)
def test_ties_by_hand(normalize, w):
    base, m = stack()
    d = torch.stack([keep_top(t - base, 0.3) for t in m])
    wd = d * torch.tensor(w)[:, None]
    sign = torch.where(wd.sum(0) >= 0, 1.0, -1.0)
    mask = wd.sign() == sign
    want = (wd * mask).sum(0)
    share = (torch.tensor(w)[:, None] * mask).sum(0)
    if normalize:
        want = want / share.where(share != 0, torch.ones(()))
    torch.testing.assert_close(run("ties", base, m, weight=w, density=0.3, normalize=normalize), base + want)


def test_ties_of_many_models():
    "More models than a byte can count agree as few do."
    d = torch.randn(300, 50, generator=torch.Generator().manual_seed(3))
    got = run("ties", torch.zeros(50), list(d), weight=0.5, density=1.0)
    agree = d.sign() == d.sum(0).sign()
    torch.testing.assert_close(got, (d * agree).sum(0) / agree.sum(0))


@pytest.mark.parametrize("method", [n for n, r in RECIPES.items() if n.startswith(("dare", "della", "breadcrumbs"))])
def test_stretched_sums(method):
    "What a sum is stretched by may be taken into its weights: the same as one model at a time."
    base, m = stack()
    normalize = {"normalize": False, "rescale": True} if "paper" not in method else {"normalize": False}
    got = run(method, base, m, weight=[1.0, 0.5, 0.7], density=0.6, **normalize)
    alone = [
        run(method, base, [base if i != j else t for j, t in enumerate(m)], weight=1.0, density=0.6, **normalize) - base
        for i in range(len(m))
    ]
    if RECIPES[method].name in (
        "dare_linear",
        "dare_linear_paper",
        "della_linear",
        "della_linear_paper",
        "breadcrumbs",
    ):
        want = base + sum(w * d for w, d in zip([1.0, 0.5, 0.7], alone))
    else:
        d = torch.stack([w * a for w, a in zip([1.0, 0.5, 0.7], alone)])
        want = base + (d * (d.sign() == torch.where(d.sum(0) >= 0, 1.0, -1.0))).sum(0)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


def test_ties_of_the_paper():
    "Trim the whole vector, elect without weights, mean of those that agree."
    g = torch.Generator().manual_seed(2)
    base = {"a": torch.randn(50, 7, generator=g), "b": torch.randn(90, generator=g)}
    m = [
        {k: t + s * torch.randn(t.shape, generator=g) for (k, t), s in zip(base.items(), (1.0, 0.2))} for _ in range(3)
    ]
    flat = lambda s: torch.cat([t.reshape(-1) for t in s.values()])
    d = torch.stack([keep_top(flat(s) - flat(base), 0.2) for s in m])
    sign = d.sum(0).sign()
    agree = (d.sign() == sign) & (d != 0)
    want = flat(base) + 0.8 * (d * agree).sum(0) / agree.sum(0).clamp_min(1)
    got = flat(merge_states("ties_paper", base, m, weight=1.0, density=0.2, scale=0.8))
    torch.testing.assert_close(got, want)
    assert (got - flat(merge_states("ties", base, m, weight=1.0, density=0.2, scale=0.8))).abs().max() > 0.1


def test_dare_is_unbiased_and_rescales():
    base, m = stack(n=400, k=1)
    draws = torch.stack([run("dare_linear_paper", base, m, weight=1.0, density=0.3, seed=s) for s in range(400)]) - base
    kept = draws != 0
    assert abs(kept.float().mean() - 0.3) < 0.01
    torch.testing.assert_close(draws[0][kept[0]], ((m[0] - base) / 0.3)[kept[0]], atol=1e-5, rtol=0)
    d, n = m[0] - base, len(draws)
    assert (((draws.mean(0) - d) / (d.abs() * math.sqrt((1 / 0.3 - 1) / n))).abs() < 5).all()
    measured = run("dare_linear", base, m, weight=1.0, density=0.3) - base
    torch.testing.assert_close(measured.abs().sum(), d.abs().sum())


def test_breadcrumbs_drops_both_ends():
    base, m = stack(n=1000, k=1)
    d = m[0] - base
    moved = run("breadcrumbs", base, m, weight=1.0, density=0.5, gamma=0.1) != base
    order = d.abs().argsort()
    assert set(moved.nonzero().view(-1).tolist()) == set(order[400:900].tolist())


@pytest.mark.parametrize("method, epsilon", [("della_linear", 0.3), ("della_linear_paper", 0.6)])
def test_the_paper_names_the_whole_window_and_mergekit_half_of_it(method, epsilon):
    "Chances from 0.2 to 0.8 at density 0.5, told either way; the values are looked at, so no chance is in the test."
    base, m = stack(n=1000, k=1)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging_recipes, "_mask", lambda parts, i, a, b, chances, *rest: seen.append(chances) or chances > 0)
        run(method, base, m, weight=1.0, density=0.5, epsilon=epsilon)
    assert min(o.min() for o in seen) == pytest.approx(0.2) and max(o.max() for o in seen) == pytest.approx(0.8)


def test_both_names_of_della_have_one_default():
    assert RECIPES["della_paper"].each["epsilon"] == 2 * RECIPES["della"].each["epsilon"]
    assert RECIPES["della_linear_paper"].each["epsilon"] == 2 * RECIPES["della_linear"].each["epsilon"]


def test_della_prefers_large_entries():
    base = torch.zeros(4, 1000)
    m = base + torch.arange(1.0, 1001) / 1000
    kept = (
        torch.stack(
            [
                merge_states(
                    "della_linear_paper", {"w": base}, [{"w": m}], weight=1.0, density=0.5, epsilon=0.8, seed=s
                )["w"]
                != 0
                for s in range(60)
            ]
        )
        .float()
        .mean((0, 1))
    )
    assert abs(kept.mean() - 0.5) < 0.02 and kept[:100].mean() < 0.2 and kept[-100:].mean() > 0.8


def test_model_stock_and_karcher_and_sce():
    base, m = stack()
    d = torch.stack([t - base for t in m])
    cos = torch.stack(
        [torch.nn.functional.cosine_similarity(d[i], d[j], dim=0) for i, j in ((0, 1), (0, 2), (1, 2))]
    ).mean()
    t = 3 * cos / (1 + 2 * cos)
    torch.testing.assert_close(run("model_stock", base, m), (1 - t) * base + t * sum(m) / 3)
    assert run("karcher", None, [m[0], m[0] * 2]).div(m[0]).sub(1.5).abs().max() < 1e-4
    var = d.var(0, unbiased=False)
    mask = torch.zeros_like(var)
    mask[var.topk(int(len(var) * 0.4)).indices] = 1
    d = d * mask
    w = d.square().mean(1) / d.square().mean(1).sum()
    agree = d.sign() == torch.where(d.sum(0) >= 0, 1.0, -1.0)
    torch.testing.assert_close(
        run("sce", base, m, select_topk=0.4),
        base + (w[:, None] * d * agree).sum(0) / (w[:, None] * agree).sum(0).clamp_min(1e-6),
    )


@pytest.mark.parametrize("method", RECIPES)
def test_pieces_do_not_matter(method, monkeypatch):
    base, m = stack(n=40 * 50)
    base, m = base.view(40, 50), [t.view(40, 50) for t in m[: 1 if RECIPES[method].most == 1 else 3]]
    p = {
        k: v
        for k, v in dict(
            weight=0.5, density=0.5, t=0.4, gamma=0.05, epsilon=0.2, select_topk=0.5, filter_wise=True
        ).items()
        if k in RECIPES[method].each | RECIPES[method].shared
    }
    base = base if RECIPES[method].base else None
    whole = run(method, base, m, **p)
    monkeypatch.setattr(merging_parts, "CHUNK", 150)
    monkeypatch.setattr(merging_states.Chain, "step", 170)
    torch.testing.assert_close(run(method, base, m, **p), whole, atol=1e-6, rtol=0)


def test_a_model_alone_comes_back():
    base, m = stack(k=1)
    for method in ("task_arithmetic", "ties", "ties_paper", "dare_linear", "dare_ties", "breadcrumbs", "della"):
        torch.testing.assert_close(run(method, base, m, weight=1.0), m[0], atol=1e-6, rtol=0)


# Selection and chance


def distributions():
    g = torch.Generator().manual_seed(3)
    x = torch.randn(200_000, generator=g).abs()
    yield from (
        x,
        x.sort().values,
        (x * 3).round(),
        torch.zeros(9000),
        x.bfloat16().float(),
        torch.cat([torch.zeros(150_000), x[:50_000]]),
        x[:1],
        x[:13],
        torch.full((3000,), 2.0),
        x * 1e-40,
    )


@pytest.mark.parametrize("data", distributions())
def test_selection_is_exact(data):
    n, order = len(data), data.sort(descending=True).values
    for k in {1, 2, n // 100, n // 5, n // 2, n - 1, n} - {0}:
        if k <= n:
            assert kth_largest(lambda a, b: data[None, a:b], n, [k]) == [float(order[k - 1])]


def test_selection_of_rows_in_pieces():
    data = torch.rand(3, 100_000, generator=torch.Generator().manual_seed(4))
    pieces = lambda f: [f(a, min(a + 7777, 100_000)) for a in range(0, 100_000, 7777)]
    ranks = [10, 50_000, 99_999]
    assert kth_largest(lambda a, b: data[:, a:b], 100_000, ranks, pieces) == [
        float(r.sort(descending=True).values[k - 1]) for r, k in zip(data, ranks)
    ]


def test_selection_reads_little_more_than_once():
    data, read = torch.randn(1, 1_000_000, generator=torch.Generator().manual_seed(5)).abs(), [0]

    def values(a, b):
        read[0] += b - a
        return data[:, a:b]

    kth_largest(values, 1_000_000, [200_000])
    assert read[0] <= 1.04 * 1_000_000


def test_selection_of_rows_that_differ():
    """Rows of a matrix have scales of their own: the bracket knows from its sample, and is missed as seldom as
    otherwise."""
    g, passes = torch.Generator().manual_seed(6), []
    for _ in range(30):
        data = (torch.randn(600, 900, generator=g) * torch.randn(600, 1, generator=g).exp()).abs().reshape(1, -1)
        passes.append(0)

        def pieces(f):
            passes[-1] += 1
            return [f(0, data.shape[1])]

        assert kth_largest(lambda a, b: data[:, a:b], data.shape[1], [200_000], pieces) == [
            float(data[0].sort(descending=True).values[199_999])
        ]
    assert sum(passes) <= 33


@pytest.mark.parametrize("share", [0.01, 0.6, 1.0])
def test_selection_among_what_is_no_number(share):
    "It ends; that a NaN is there is for the blend to say."
    data = np.abs(np.random.default_rng(0).standard_normal(60_000, np.float32))
    data[: int(share * len(data))] = np.nan
    (found,) = kth_largest(lambda a, b: data[None, a:b], len(data), [30_000])
    assert math.isfinite(found)


def test_streams_are_parts_of_one_stream():
    whole = coins("k", 0, 5 * merging_chance.PIECE)
    for a, b in (
        (0, 1),
        (1, 2),
        (merging_chance.PIECE - 1, merging_chance.PIECE + 1),
        (3, 4 * merging_chance.PIECE + 7),
        (2 * merging_chance.PIECE, 3 * merging_chance.PIECE),
    ):
        assert (coins("k", a, b) == whole[a:b]).all()
    assert (
        abs(whole.mean() / 2**32 - 0.5) < 0.003
        and len(np.unique(whole[: merging_chance.PIECE])) > 0.99 * merging_chance.PIECE
    )


def test_conflicts():
    assert conflicts(torch.tensor([[1.0, -1, 0, 2], [-1.0, -1, 3, 2]])) == 1 / 3


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


def test_interrupted_it_goes_on(source, tmp_path, monkeypatch):
    c, made = recipe_for(source, "dare_ties", density=0.5), []
    whole = tensors(merge(c, tmp_path / "whole").folder)
    make = merging_write._make

    def stops(plan, job, *rest):
        if len(made) == 9:
            raise KeyboardInterrupt
        make(plan, job, *rest)
        made.append(job.name)

    monkeypatch.setattr(merging_write, "_make", stops)
    with pytest.raises(KeyboardInterrupt):
        merge(c, tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()
    again = []
    monkeypatch.setattr(
        merging_write, "_make", lambda plan, job, *rest: (make(plan, job, *rest), again.append(job.name))
    )
    merge(c, tmp_path / "out", threads=2)
    assert len(made) == 9 and not set(made[:8]) & set(again) and same(tensors(tmp_path / "out"), whole)


def test_another_merge_does_not_go_on(source, tmp_path, monkeypatch):
    make, made = merging_write._make, []

    def stops(plan, job, *rest):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(make(plan, job, *rest))

    monkeypatch.setattr(merging_write, "_make", stops)
    with pytest.raises(KeyboardInterrupt):
        merge(recipe_for(source, density=0.5), tmp_path / "out", threads=1)
    monkeypatch.setattr(merging_write, "_make", make)
    other = recipe_for(source, density=0.2)
    assert same(tensors(merge(other, tmp_path / "out").folder), tensors(merge(other, tmp_path / "fresh").folder))


def test_killed_it_goes_on(source, tmp_path):
    c = recipe_for(source, density=0.5)
    (tmp_path / "c.yml").write_text(yaml.safe_dump(c))
    code = f"""
import os
from ftbook.merging import engine, write
make, made = write._make, []
def dies(*a):
    if len(made) == 7: os._exit(9)
    made.append(make(*a))
write._make = dies
engine.merge({str(tmp_path / 'c.yml')!r}, {str(tmp_path / 'out')!r}, threads=1)"""
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 9
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.merging").is_dir()
    assert same(tensors(merge(c, tmp_path / "out").folder), tensors(merge(c, tmp_path / "fresh").folder))


def test_a_full_disk(source, tmp_path, monkeypatch):
    c, write, count = recipe_for(source, density=0.5), os.pwrite, []

    def full(*a):
        count.append(1)
        if len(count) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*a)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="the disk is full.*goes on where it was") as e:
        merge(c, tmp_path / "out", threads=2)
    assert e.value.errno == errno.ENOSPC and not (tmp_path / "out").exists()
    monkeypatch.setattr(os, "pwrite", write)
    assert same(tensors(merge(c, tmp_path / "out").folder), tensors(merge(c, tmp_path / "fresh").folder))


def test_a_disk_that_is_too_small(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OSError, match="takes .* MB and .* has 0 MB free"):
        merge(recipe_for(source), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.iterdir())


def test_overwriting(source, tmp_path):
    merge(recipe_for(source), tmp_path / "out")
    with pytest.raises(FileExistsError, match="exists: choose another"):
        merge(recipe_for(source), tmp_path / "out")
    (tmp_path / "out" / "stale.txt").write_text("x")
    merge(recipe_for(source), tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "stale.txt").exists()
    with pytest.raises(ValueError, match="is one of the models"):
        merge(recipe_for(source), source / "red", overwrite=True)


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


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are listed on Linux only")
def test_a_merge_that_fails_closes_its_files(source, tmp_path, monkeypatch):
    def fails(*a):
        raise ValueError("no number")

    monkeypatch.setattr(merging_write, "_make", fails)
    with pytest.raises(ValueError, match="no number") as kept:  # its traceback keeps every local name alive
        merge(recipe_for(source, density=0.5), tmp_path / "out", threads=1)
    held = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
    assert kept.tb and not [o for o in held if ".out.merging" in o]


# Configurations

EXAMPLES = {  # the shapes of the configurations that mergekit publishes as examples, with other names for the models
    "linear": (
        "models:\n  - model: a\n    parameters:\n      weight: 1.0\n  - model: b\n    parameters:\n      weight: "
        "0.3\nmerge_method: linear\ndtype: float16\n"
    ),
    "ties": (
        "models:\n  - model: a\n    parameters:\n      density: [1, 0.7, 0.1] # density gradient\n      weight: "
        "1.0\n  - model: b\n    parameters:\n      density: 0.5\n      weight: [0, 0.3, 0.7, 1]\n  - model: c\n    "
        "parameters:\n      density: 0.33\n      weight:\n        - filter: mlp\n          value: 0.5\n        - "
        "value: 0\nmerge_method: ties\nbase_model: base\nparameters:\n  normalize: true\n  int8_mask: true\ndtype: "
        "float16\n"
    ),
    "bio": (
        "models:\n  - model: a\n    parameters:\n      density: 0.5\n      weight: 0.5\n  - model: b\n    "
        "parameters:\n      density: 0.5\n      weight: 0.5\nmerge_method: ties\nbase_model: base\nparameters:\n  "
        "normalize: false\n  int8_mask: true\ndtype: float16"
    ),
    "gradient slerp": (
        "slices:\n  - sources:\n      - model: a\n        layer_range: [0, 3]\n      - model: b\n        "
        "layer_range: [0, 3]\nmerge_method: slerp\nbase_model: a\nparameters:\n  t:\n    - filter: self_attn\n     "
        " value: [0, 0.5, 0.3, 0.7, 1]\n    - filter: mlp\n      value: [1, 0.5, 0.7, 0.3, 0]\n    - value: 0.5 # "
        "fallback for rest of tensors\ndtype: float16\n"
    ),
    "44 layers": (
        "slices:\n  - sources:\n    - model: a\n      layer_range: [0, 2]\n  - sources:\n    - model: b\n      "
        "layer_range: [1, 3]\nmerge_method: passthrough\ndtype: float16\n"
    ),
    "fewer layers": (
        "slices:\n  - sources:\n    - model: a\n      layer_range: [0, 2]\nmerge_method: passthrough\ndtype: float16\n"
    ),
    "base listed": (
        "models:\n  - model: a\n    parameters:\n      density: [1, 0.7, 0.1]\n      weight: 1.0\n  - model: "
        "base\n    parameters:\n      density: 0.5\n      weight: [0, 0.3, 0.7, 1]\nmerge_method: "
        "ties\nbase_model: base\nparameters:\n  normalize: true\ndtype: float16"
    ),
}

REFUSED = {  # published too, and not supported: what is named
    "models:\n  - model: a\n  - model: b\nmerge_method: arcee_fusion\nbase_model: a\n": "merge_method 'arcee_fusion' is not supported",
    (
        "models:\n  - model: a\n  - model: b\nmerge_method: nuslerp\nparameters:\n  geodesic: true\ntokenizer:\n  "
        "source: union\n"
    ): "merge_method 'nuslerp' is not supported",
    "models:\n  - model: a\n  - model: b\nmetric_method: scale\ndtype: float32\n": "'metric_method' is not supported",
    (
        "slices:\n  - sources:\n      - model: a\n        layer_range: [0, 40]\n      - model: b\n        "
        "layer_range: [0, 40]\nmerge_method: slerp\nbase_model: a\nparameters:\n  t:\n    - pattern: self_attn\n   "
        "   value: [0, 1]\n    - value: 0.5\n"
    ): "parameter t: 'pattern' is not supported",
    "models:\n  - model: a\n    lora: b\n    parameters:\n      weight: 0.6\nmerge_method: linear\n": "'lora' is not supported",
    "models:\n  - model: a\n    parameters:\n      encoder_weight: 0.8\nmerge_method: linear\n": "'encoder_weight' is not supported",
    "models:\n  - model: a\nmerge_method: linear\nout_path: x\n": "'out_path' is not supported",
    "models:\n  - model: a\nmerge_method: linear\n---\nmodels:\n  - model: b\nmerge_method: linear\n": "mergekit-mega",
    "modules:\n  text: {models: [{model: a}]}\n  vision: {models: [{model: a}]}\nmerge_method: linear\n": "text, vision are several",
    "models:\n  - model: a\nmerge_method: linear\ntokenizer:\n  source: union\n  tokens: {x: {source: a}}\n": "tokenizer: 'tokens' is not supported",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_published_examples(name, source, tmp_path):
    for new, old in zip("abc", NAMES[1:]):
        shutil.copytree(source / old, tmp_path / new)
    shutil.copytree(source / "base", tmp_path / "base")
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        done = merge(EXAMPLES[name], "out")
    finally:
        os.chdir(before)
    made = tensors(tmp_path / "out")
    assert all(t.dtype == torch.float16 for t in made.values())
    layers = {"44 layers": 4, "fewer layers": 2}.get(name, 3)
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == layers
        and len(made) == 2 + 9 * layers
    )
    if name == "44 layers":
        assert torch.equal(
            made["model.layers.2.mlp.up_proj.weight"],
            tensors(source / "blue")["model.layers.1.mlp.up_proj.weight"].half(),
        )
    if name == "gradient slerp":
        assert torch.equal(
            made["model.layers.0.self_attn.q_proj.weight"],
            tensors(source / "red")["model.layers.0.self_attn.q_proj.weight"].half(),
        )
    assert done.plan.recipe.name == yaml.safe_load(EXAMPLES[name])["merge_method"]


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_not_supported_is_named(text):
    with pytest.raises(ValueError) as e:
        read_config(text)
    assert REFUSED[text] in str(e.value)


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


def words(folder, tokens, added=()):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [])))
    made.add_tokens(list(added))
    made.save_pretrained(folder)


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


def test_shuffled_tokens_are_refused_and_united(tmp_path):
    plain = [f"w{i}" for i in range(90)]
    for i, (name, order) in enumerate((("base", plain), ("red", plain[::-1]))):
        llama(0).save_pretrained(tmp_path / name)
        words(tmp_path / name, order)
    t = tensors(tmp_path / "red")
    save_file(
        t | {"model.embed_tokens.weight": t["model.embed_tokens.weight"].flip(0).contiguous()},
        tmp_path / "red" / MODEL,
    )
    c = recipe_for(tmp_path, "task_arithmetic", NAMES[1:2])
    with pytest.raises(ValueError, match="rows of the embeddings would be mixed up"):
        plan_merge(c)
    merge(c | dict(tokenizer_source="union"), tmp_path / "out")
    assert gap(tensors(tmp_path / "out"), tensors(tmp_path / "base")) < 1e-7


def test_other_languages_of_tokens_are_refused(tmp_path):
    for i, (name, order) in enumerate((("base", [f"w{i}" for i in range(90)]), ("red", [f"v{i}" for i in range(90)]))):
        llama(i).save_pretrained(tmp_path / name)
        words(tmp_path / name, order)
    for source in ("union", "base"):
        with pytest.raises(ValueError, match="a merge of the two makes no sense"):
            plan_merge(recipe_for(tmp_path, "task_arithmetic", NAMES[1:2], tokenizer_source=source))


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


def adapter(folder, base, seed, save=True, **kw):
    import peft

    torch.manual_seed(seed)
    model = peft.get_peft_model(
        base, peft.LoraConfig(**dict(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]) | kw)
    )
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    if save:
        model.save_pretrained(folder)
    return model


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


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(use_dora=True), "DoRA"),
        (dict(modules_to_save=["norm"]), "norm.weight, which is more than a product"),
        (dict(lora_bias=True), "lora_B.bias"),
    ],
)
def test_adapters_that_are_more_than_products(source, tmp_path, options, said):
    adapter(tmp_path / "a", llama(0), 1, **options)
    with pytest.raises(ValueError, match=said):
        plan_merge(
            dict(
                merge_method="linear",
                models=[dict(model=f"{source / 'base'}+{tmp_path / 'a'}", parameters=dict(weight=1.0))],
            )
        )


def test_an_adapter_of_another_base(source, tmp_path):
    adapter(tmp_path / "a", llama(0, intermediate_size=40), 1)
    with pytest.raises(ValueError, match="it was made for another base"):
        plan_merge(
            dict(
                merge_method="linear",
                models=[dict(model=f"{source / 'base'}+{tmp_path / 'a'}", parameters=dict(weight=1.0))],
            )
        )


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


def spoil(models, name, change):
    t = tensors(models / name)
    for f in (models / name).glob("*.safetensors"):
        f.unlink()
    (models / name / INDEX).unlink(missing_ok=True)
    save_file({k: v.contiguous() for k, v in change(t).items()}, models / name / MODEL)


def refuses(c, said):
    with pytest.raises(ValueError) as e:
        plan_merge(c)
    assert said in str(e.value), str(e.value)


def test_different_architectures(models):
    c = json.loads((models / "red" / "config.json").read_text())
    (models / "red" / "config.json").write_text(
        json.dumps(c | dict(model_type="mistral", architectures=["MistralForCausalLM"]))
    )
    refuses(recipe_for(models), "is of another architecture")


def test_a_missing_and_an_extra_tensor(models):
    spoil(models, "red", lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"})
    refuses(recipe_for(models), "red lacks model.norm.weight")
    spoil(models, "red", lambda t: t | {"model.norm.weight": torch.ones(32), "more": torch.ones(3)})
    refuses(recipe_for(models), "red has more, which")


def test_a_shape_that_is_off(models):
    spoil(models, "green", lambda t: t | {"model.norm.weight": torch.ones(33)})
    refuses(recipe_for(models), "model.norm.weight is (33,) in")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "model_stock", "slerp", "sce", "karcher"])
def test_numbers_that_are_none(models, tmp_path, bad, method):
    def change(t):
        t["model.layers.1.mlp.up_proj.weight"][3, 4] = bad
        return t

    spoil(models, "red", change)
    p = {"parameters": dict(t=0.5)} if method == "slerp" else {}
    c = recipe_for(
        models, method, NAMES[1:2] if method == "slerp" else NAMES[1:], "base" if RECIPES[method].base else None, **p
    )
    with pytest.raises(ValueError, match=r"red: model.layers.1.mlp.up_proj.weight has 1 values"):
        merge(c, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_of_nothing_but_nan(models, tmp_path):
    "A threshold cannot be found in it, and the merge says so all the same."
    name = "model.layers.1.mlp.up_proj.weight"
    spoil(models, "red", lambda t: t | {name: torch.full_like(t[name], math.nan)})
    with pytest.raises(ValueError, match=f"red: {name} has .* values"):
        merge(recipe_for(models, "ties", density=0.4), tmp_path / "out")


def test_an_overflow_is_named(models, tmp_path):
    spoil(models, "red", lambda t: t | {"model.norm.weight": torch.full((32,), 60000.0)})
    with pytest.raises(ValueError, match="model.norm.weight comes out larger than F16 can say"):
        merge(recipe_for(models, "task_arithmetic", dtype="float16", weight=2.0), tmp_path / "out")


def test_a_zero_task_vector_is_noted(models, tmp_path):
    shutil.copytree(models / "base", models / "twin")
    done = merge(recipe_for(models, "ties", ("red", "twin"), density=0.5), tmp_path / "out")
    assert (
        done.notes == [f"{models / 'twin'} equals the base: its task vector is zero"]
        and done.notes[0] in (done.folder / "README.md").read_text()
    )
    assert merge(recipe_for(models, "ties", ("red", "blue"), density=0.5), tmp_path / "out2").notes == []


@pytest.mark.parametrize("method", ["linear", "ties", "della", "task_arithmetic"])
def test_weights_that_sum_to_zero(source, method):
    c = recipe_for(
        source, method, NAMES[1:3], "base" if RECIPES[method].base else None, parameters=dict(normalize=True)
    )
    for m, w in zip(c["models"], (0.5, -0.5)):
        m["parameters"]["weight"] = w
    refuses(c, "the weights sum to zero")
    plan_merge(c | dict(parameters=dict(normalize=False)))


@pytest.mark.parametrize(
    "given, said",
    [
        (dict(density=0.0), "density=0"),
        (dict(density=-0.1), "density=-0.1"),
        (dict(density=1.2), "density=1.2"),
        (dict(density=math.nan), "must be finite"),
        (dict(weight=math.inf), "must be finite"),
        (dict(density=0.5, parameters={"lambda": math.nan}), "must be finite"),
        (dict(weight=None), "needs a weight"),
    ],
)
def test_parameters_out_of_range(source, given, said):
    refuses(recipe_for(source, **given), said)


def test_more_parameters_out_of_range(source):
    refuses(recipe_for(source, "della", density=0.9, epsilon=0.2), "must stay between 0 and 1")
    refuses(recipe_for(source, "breadcrumbs", density=0.9, gamma=1.0), "gamma=1.0")
    refuses(recipe_for(source, "sce", parameters=dict(select_topk=0)), "select_topk=0")
    refuses(recipe_for(source, "ties_paper", density=[0.2, 0.5]), "cannot differ between tensors")


def test_unknown_keys(source):
    c = recipe_for(source)
    for change, said in [
        (dict(metod=1), "'metod' is not supported"),
        (dict(parameters=dict(densty=1)), "'densty' is not supported"),
        (dict(models=[dict(model="a", weigth=1)]), "'weigth' is not supported"),
        (dict(chat_template="chatml"), "chat_template 'chatml' is not supported"),
        (dict(slices=[]), "either models or slices"),
        (dict(models=[]), "lists no model"),
        (dict(models=3), "models must be a list, not 3"),
        (dict(models=["red"]), "a model must be a mapping"),
        (dict(models=[dict(parameters={})]), "names no model"),
        (dict(dtype="int4"), "dtype must be one of"),
    ]:
        with pytest.raises(ValueError) as e:
            merge(c | change, source.parent / "never")
        assert said in str(e.value), str(e.value)


def test_paths_that_lead_out(models):
    index = json.loads((models / "blue" / INDEX).read_text())
    for path in ("../red/model.safetensors", "/etc/passwd", "a/../../x.safetensors", "..", "sub\\x.safetensors"):
        (models / "blue" / INDEX).write_text(
            json.dumps(index | dict(weight_map={k: path for k in index["weight_map"]}))
        )
        refuses(recipe_for(models), "leads out of its folder")


def test_pickles_are_refused(models):
    (models / "red" / MODEL).unlink()
    torch.save({"a": 1}, models / "red" / "pytorch_model.bin")
    refuses(recipe_for(models), "holds only pickled weights")
    refuses(recipe_for(models), "To convert it: python -c")


def test_truncated_and_missing_shards(models):
    shards = sorted((models / "blue").glob("*.safetensors"))
    with open(shards[-1], "r+b") as f:
        f.truncate(shards[-1].stat().st_size - 2)
    refuses(recipe_for(models), "is truncated or damaged")
    shards[-1].unlink()
    refuses(recipe_for(models), f"lacks {shards[-1].name}")


def test_headers_that_point_elsewhere(models):
    "Offsets that leave the file, or that are not as long as the tensor."
    file = models / "red" / MODEL
    data = file.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    for ends in ([-8, 120], [0, 64], [10**9, 10**9 + 128]):
        text = json.dumps(
            header | {"model.norm.weight": header["model.norm.weight"] | dict(data_offsets=ends)}
        ).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n :])
        refuses(recipe_for(models), "truncated or damaged, model.norm.weight does not lie in it")
    file.write_bytes(b"\xff" * 40)
    refuses(recipe_for(models), "is truncated or damaged")


def test_a_fine_tune_of_another_base_is_noted(models):
    from transformers import LlamaForCausalLM

    assert plan_merge(recipe_for(models)).notes == []
    torch.manual_seed(7)
    LlamaForCausalLM(config()).save_pretrained(models / "green")
    notes = plan_merge(recipe_for(models)).notes
    assert len(notes) == 1 and f"the task vector of {models / 'green'} is 1.4 times as long" in notes[0]


def test_an_adapter_that_names_another_base_is_noted(source, tmp_path):
    adapter(tmp_path / "a", llama(0), 1)
    c = recipe_for(source, "task_arithmetic", ("red",))
    c["models"].append(dict(model=f"{source / 'base'}+{tmp_path / 'a'}", parameters=dict(weight=1.0)))
    said = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for name, noted in ((str(source / "base"), 0), ("someone/BASE", 0), ("someone/another", 1)):
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(said | dict(base_model_name_or_path=name)))
        assert sum("was trained on someone/another" in n for n in plan_merge(c).notes) == noted


def test_a_merge_onto_another_base_is_noted(models, tmp_path):
    done = merge(recipe_for(models, "task_arithmetic", ("red", "blue"), weight=0.5), tmp_path / "first")
    again = recipe_for(models, "task_arithmetic", ("green",), weight=0.5)
    again["models"].append(dict(model=str(done.folder), parameters=dict(weight=0.5)))
    assert merge(again, tmp_path / "second").notes == []
    spoil(models, "base", lambda t: {k: v * 1.01 for k, v in t.items()})
    assert "is a merge onto another base" in merge(again, tmp_path / "third").notes[-1]


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


def test_the_base_among_the_models(source, tmp_path):
    c = recipe_for(source, density=0.5)
    listed = c | dict(models=[dict(model=str(source / "base"), parameters=dict(weight=5.0)), *c["models"]])
    assert "is the base and is listed among the models" in plan_merge(listed).notes[0]
    assert same(tensors(merge(listed, tmp_path / "a").folder), tensors(merge(c, tmp_path / "b").folder))


def test_one_model_only(source, tmp_path):
    done = merge(recipe_for(source, "linear", ("red",), None), tmp_path / "out")
    assert "one model only" in done.notes[0] and gap(tensors(done.folder), tensors(source / "red")) == 0
    refuses(recipe_for(source, "model_stock", ("red",)), "takes at least 2 models beside the base, and 1 is given")
    refuses(
        recipe_for(source, "slerp", parameters=dict(t=0.5)), "takes exactly 1 model beside the base, and 3 are given"
    )
    refuses(recipe_for(source, base=None), "needs a base_model")
    refuses(recipe_for(source, "linear", ("red", "red"), None), "is listed twice")


def test_mixed_precision_is_noted(models, tmp_path):
    spoil(models, "red", lambda t: {k: v.bfloat16() for k, v in t.items()})
    c = recipe_for(models, "linear", ("red", "blue"), None)
    assert "are stored as" in plan_merge(c).notes[0]
    a, b = tensors(models / "red"), tensors(models / "blue")
    assert gap(tensors(merge(c, tmp_path / "out").folder), {k: (t.float() + b[k]) / 2 for k, t in a.items()}) < 1e-7


def test_integers_are_copied_or_refused(models, tmp_path):
    for n in NAMES:
        spoil(models, n, lambda t: t | {"steps": torch.tensor([7, 8])})
    assert tensors(merge(recipe_for(models), tmp_path / "out").folder)["steps"].tolist() == [7, 8]
    spoil(models, "red", lambda t: t | {"steps": torch.tensor([7, 9])})
    refuses(recipe_for(models), "steps is stored in integers")


def test_quantised_models_are_refused(models):
    c = json.loads((models / "red" / "config.json").read_text())
    (models / "red" / "config.json").write_text(
        json.dumps(c | dict(quantization_config=dict(quant_method="bitsandbytes")))
    )
    refuses(recipe_for(models), "is quantised (bitsandbytes)")


def test_a_model_that_is_nowhere(source):
    refuses(recipe_for(source, names=("red", "nobody")), "neither a folder here nor")


def test_layer_ranges(source):
    def slices(*ranges):
        return dict(
            merge_method="slerp",
            base_model=str(source / "base"),
            parameters=dict(t=0.5),
            slices=[
                dict(sources=[dict(model=str(source / n), layer_range=r) for n, r in zip(("base", "red"), ranges)])
            ],
        )

    refuses(slices([0, 2], [0, 3]), "they must have the same number")
    refuses(slices([0, 4], [0, 4]), "it has layers 0 to 3")


# Search


def test_search_finds_the_top():
    found = search(lambda w: -((w[0] - 0.3) ** 2) - (w[1] - 0.8) ** 2, [0.5, 0.5], trials=40)
    assert abs(found.weights[0] - 0.3) < 0.02 and abs(found.weights[1] - 0.8) < 0.02 and len(found.tried) <= 40
    assert found.score >= found.start and all(0 <= x <= 1 for w, _ in found.tried for x in w)
    with pytest.raises(ValueError, match="the score is nan"):
        search(lambda w: math.nan, [0.5])
    with pytest.raises(ValueError, match="must lie between"):
        search(lambda w: 0.0, [2.0])


# mergekit

sys.path.insert(0, str(nbs / "bench"))
import merge_worker as worker  # noqa: E402


def check_runs(runs):
    assert [r["question"] for r in runs] == list(worker.QUESTIONS)
    for r in runs:
        assert r["largest"] <= 1e-6 and r["effect"] > 0.01 and r["tensors"] >= 20 and r["same_configuration"], r


def test_recorded_parity_with_mergekit():
    results = worker.read_parity()
    check_runs(results["runs"])
    assert results["versions"]["theirs"]["mergekit"] == "0.1.5"


def parity_rows():
    """(what, largest difference of any tensor, tolerance) against mergekit: computed where it can be asked, else as
    nbs/bench/merge recorded it, which the name says."""
    live = bool(os.environ.get(worker.PYTHON))
    runs = worker.parity()[0] if live else worker.read_parity()["runs"]
    return [(r["question"] + " (recorded)" * (not live), r["largest"], 1e-6) for r in runs]


def test_parity_rows(monkeypatch):
    monkeypatch.delenv(worker.PYTHON, raising=False)
    rows = parity_rows()
    assert len(rows) == len(worker.QUESTIONS) and all(
        name.endswith("(recorded)") and gap <= tolerance for name, gap, tolerance in rows
    )


@pytest.mark.skipif(not os.environ.get(worker.PYTHON), reason=f"{worker.PYTHON} names no interpreter with mergekit")
def test_parity_with_mergekit():
    check_runs(worker.parity()[0])


def test_every_method_of_mergekit_that_is_here_is_compared():
    asked = {c["merge_method"] for c in worker.QUESTIONS.values()}
    assert asked == {n for n in RECIPES if not n.endswith("_paper")}
