"""Every measure of distance between two domains, and the bits per byte of every corpus."""

import random

import numpy as np

from tasks import DOMAINS, split_domain

KEY = 'kind', 'corpus', 'train', 'target', 'seed'
PACKAGES = 'torch', 'transformers', 'scikit-learn', 'numpy'
PER_PROCESS = 0
CORPORA = (*DOMAINS, 'jargon', 'foldoc')
DRAWS = 5
loaded = {}


def plan(runs):
    "Bits per byte of each corpus, then the pairs, draw by draw."
    for corpus in CORPORA:
        yield dict(kind='bits', corpus=corpus, seed=0)
    for seed in range(DRAWS):
        for target in DOMAINS:
            for name in DOMAINS:
                yield dict(kind='pair', train=name, target=target, seed=seed)


def run(job):
    "One corpus, or one pair of domains."
    if job['kind'] == 'bits':
        found = measure_bits(job['corpus'], job['seed'])
    else:
        found = measure_pair(job['train'], job['target'], job['seed'])
    return {k: round(float(v), 4) if isinstance(v, float) else v for k, v in found.items()}


def measure_bits(corpus, seed, n_rows=100):
    "Bits per byte of some rows, with a bootstrap interval over rows."
    from ftbook.data.corpora import load_corpus
    from ftbook.models.load import load_model
    from ftbook.quality.surprise import bits_per_byte, pool_bits

    if 'lm' not in loaded:
        loaded['lm'] = load_model('smollm2-135m')
    texts = random.Random(seed).sample([r.get('text') or r['definition'] for r in load_corpus(corpus)], n_rows)
    values = bits_per_byte(*loaded['lm'], texts)
    rng = np.random.default_rng(seed)
    again = [pool_bits(values[i], [texts[k] for k in i]) for i in rng.integers(0, n_rows, (2000, n_rows))]
    low, high = np.quantile(again, [0.025, 0.975])
    return dict(rows=n_rows, dtype=str(loaded['lm'][0].dtype), bits=pool_bits(values, texts), low=low, high=high)


def side(name, seed, part):
    "(texts, vectors) of the rows that a run of this seed trains or tests on."
    from ftbook.models.load import embed, load_encoder

    if 'encoder' not in loaded:
        loaded['encoder'] = load_encoder('minilm-l6', device='cpu')
    if (name, seed) not in loaded:
        texts = [[r['text'] for r in rows] for rows in split_domain(name, seed, 600, 360)]
        loaded[name, seed] = [(t[:360], embed(*loaded['encoder'], t[:360]).numpy()) for t in texts]
    return loaded[name, seed][part]


def measure_pair(name, target, seed):
    "All measures between a training domain and a target; the target's own training rows too."
    from ftbook.quality.domain_measures import ngram_divergence
    from ftbook.quality.domains import domain_distances

    (a, va), (b, vb) = side(name, seed, 0), side(target, seed, 1)
    bigrams = ngram_divergence(a, b, 2, size=4000, seed=seed)
    return dict(bigrams=bigrams, **domain_distances(a, b, va, vb, seed=seed))
