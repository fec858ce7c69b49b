"Every recipe of merging against plain torch, and the selection of the largest entries."

import math

import numpy as np
import pytest, torch

from ftbook.merging import chance as merging_chance
from ftbook.merging import parts as merging_parts
from ftbook.merging import recipes as merging_recipes
from ftbook.merging import states as merging_states
from ftbook.merging.recipes import RECIPES
from ftbook.merging.chance import coins
from ftbook.merging.vectors import conflicts
from ftbook.merging.threshold import kth_largest
from ftbook.merging.states import merge_states
from ftbook.merging.search import search
from cases.merge import models, source


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
        patch.setattr(
            merging_recipes, "_mask", lambda parts, i, a, b, chances, *rest: seen.append(chances) or chances > 0
        )
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


# Search


def test_search_finds_the_top():
    found = search(lambda w: -((w[0] - 0.3) ** 2) - (w[1] - 0.8) ** 2, [0.5, 0.5], trials=40)
    assert abs(found.weights[0] - 0.3) < 0.02 and abs(found.weights[1] - 0.8) < 0.02 and len(found.tried) <= 40
    assert found.score >= found.start and all(0 <= x <= 1 for w, _ in found.tried for x in w)
    with pytest.raises(ValueError, match="the score is nan"):
        search(lambda w: math.nan, [0.5])
    with pytest.raises(ValueError, match="must lie between"):
        search(lambda w: 0.0, [2.0])
