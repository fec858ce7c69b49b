"A made-up sweep, and rows to choose for."

import math

import numpy as np, pytest

from ftbook.choose import recommend as choose_recommend
from ftbook.choose import surface as choose_surface
from ftbook.choose import sweep as choose_sweep
from dataclasses import fields


def config(**given):
    return (
        dict.fromkeys(choose_sweep.SETTINGS)
        | dict(
            method="lora",
            lr=1e-3,
            rank=16,
            alpha_ratio=2.0,
            target_modules="all-linear",
            dropout=0.0,
            batch_size=8,
            epochs=2,
            warmup=0.03,
            precision="bfloat16",
        )
        | given
    )


def quality(r, at):
    return math.exp(-((math.log10(r["lr"] / at)) ** 2)) - 0.1 * (r["target_modules"] == "attention")


def made(at=1e-3, task="movie", part="design", n=48, method="lora", seed=0):
    "Runs whose accuracy is known: a hill over the learning rate, a step at the layers, nothing else."
    rng, runs = np.random.default_rng(seed), []
    for i in range(n):
        r = config(
            method=method,
            lr=float(10 ** rng.uniform(-5, -2)),
            rank=int(2 ** rng.integers(0, 7)),
            alpha_ratio=float(2.0 ** rng.integers(-1, 3)),
            target_modules=choose_surface.LAYERS[i % 3],
            dropout=float(rng.choice([0, 0.1])),
            batch_size=int(2 ** rng.integers(2, 6)),
            epochs=int(2 ** rng.integers(0, 3)),
            warmup=float(rng.choice([0, 0.1])),
            precision=["bfloat16", "float32"][i % 4 == 0],
        )
        if method != "lora":
            r |= dict(rank=None, alpha_ratio=None, target_modules=None, dropout=None)
        good = quality(r, at)
        runs.append(
            r
            | dict(
                part=part,
                task=task,
                seed=0,
                number=i,
                accuracy=good,
                test_accuracy=good,
                forgetting=max(0.0, math.log10(r["lr"]) + 4),
                peak_bytes=2**30,
                gib=1.0,
                cpu_seconds=float(5 * r["epochs"]),
            )
        )
    return runs


def sweep(**given):
    return choose_sweep.Sweep(
        [*made(1e-3, "movie", **given), *made(1e-3, "news", seed=1, **given)],
        dict(planned=dict(design=dict(movie=50, news=48))),
    )


@pytest.fixture(scope="module")
def known():
    return sweep()


@pytest.fixture(scope="module")
def rows():
    return [
        dict(
            text=f"row {i} says that the {'film' if i % 3 else 'play'} number {i * i} was {'good' if i % 2 else 'bad'}",
            label=["bad", "good"][i % 2],
        )
        for i in range(120)
    ]


def advised(rows, runs, **given):
    "A recommendation; keywords are of `recommend` or of `Circumstances`."
    names = {f.name for f in fields(choose_recommend.Circumstances)}
    known = choose_recommend.Circumstances(sweep=runs, **{k: v for k, v in given.items() if k in names})
    rest = {k: v for k, v in given.items() if k not in names}
    settings = dict(memory_gib=8, device="cpu", encoder=None, circumstances=known)
    return choose_recommend.recommend(rows, **(settings | rest))
