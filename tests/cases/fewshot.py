"A tiny encoder, and sentences of several classes."

import csv, random

import pytest, torch
import torch.nn.functional as F

from ftbook.fewshot import files as fewshot_files
from ftbook.fewshot.encoder import Body
from ftbook.fewshot.classifier import FewShotClassifier
from ftbook.fewshot.tuning import Tuning

WORDS = {
    "sea": "ship boat sail harbour wave captain tide anchor".split(),
    "kitchen": "bread butter oven flour spoon kettle salt sugar".split(),
    "garden": "rose spade hedge lawn seed flower tree soil".split(),
}


def sentences(n, seed=0, classes=("garden", "kitchen", "sea")):
    "n sentences of each class; every one holds three words of its class."
    rng, found = random.Random(seed), []
    for c in classes:
        found += [(f"the {' and the '.join(rng.sample(WORDS[c], 3))} number {i} of {seed}", c) for i in range(n)]
    return list(map(list, zip(*found)))


def save_tiny_encoder(folder, pooling="mean", normalise=True, layers=4):
    "A small random BERT with the tokenizer of MiniLM, as sentence-transformers keeps it."
    from transformers import AutoTokenizer, BertConfig, BertModel
    from ftbook.models.shipped import model_folder

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_folder("minilm-l6"))
    tokenizer.model_max_length = 32
    encoder = BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
        )
    ).eval()
    # what it says of a text is which words are in it
    with torch.no_grad():
        encoder.embeddings.word_embeddings.weight.mul_(30)
    fewshot_files.save_body(Body(encoder, tokenizer, pooling, normalise), folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return save_tiny_encoder(tmp_path_factory.mktemp("tiny"))


def classifier(tiny, **kw):
    return FewShotClassifier(tiny, device="cpu", dtype=torch.float32, **kw)


@pytest.fixture(scope="session")
def fitted(tiny):
    texts, labels = sentences(8)
    return classifier(tiny, tuning=Tuning(steps=6, lr=2e-3)).fit(texts, labels)


# Pairs and losses


def random_batch(n=12, d=8, k=3, seed=0):
    torch.manual_seed(seed)
    return F.normalize(torch.randn(n, d), dim=1).requires_grad_(), F.one_hot(torch.arange(n) % k, k).float()


# From a file


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows(rows)
    return path
