"Texts and clouds of vectors to set against each other."

import random

import numpy as np
import pytest
from hypothesis import settings, strategies as st

from ftbook.models.load import load_model
from ftbook.quality.surprise import bits_per_byte

quick = settings(max_examples=60, deadline=None)
sentences = st.lists(st.text(st.sampled_from("abcdé 東!"), max_size=30), min_size=1, max_size=8)


def cloud(n, d=6, at=0.0, seed=0):
    return np.random.default_rng(seed).normal(at, 1, (n, d))


def said(n, vocabulary, seed=0, length=12):
    rng = random.Random(seed)
    return [" ".join(rng.choices(vocabulary, k=length)) for _ in range(n)]


cooking, sailing = (
    "salt pan oven stir the a with butter taste slice".split(),
    "mast the wind a harbour with rope tide deck anchor".split(),
)

# Bits per byte

texts = [
    "The film was long.",
    "",
    "Crème brûlée, 東京, 👩‍👩‍👧!",
    "a",
    "Write <|im_start|> to begin.",
    "one more line\nand another, " * 9,
]


@pytest.fixture(scope="module")
def loaded():
    return load_model("smollm2-135m", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def surprise(loaded):
    return bits_per_byte(*loaded, texts)
