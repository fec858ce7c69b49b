"Duplicates found by the scripts for datatrove, against our own."

import json, random, subprocess, sys

import numpy as np
import pytest

from ftbook.quality.datatrove import choose_bands, Executor, write_datatrove
from ftbook.quality.minhash import jaccard, s_curve, shingles
from ftbook.quality.join import near_duplicates
from ftbook.quality.words import words
from cases.duplicates import distinct, pairs


# datatrove


def planted_rows(n=4000, seed=0):
    """Sentences of three corpora, each with an edited copy of one to four words' difference; some copies besides, and
    rows with hardly a word."""
    from ftbook.data.corpora import load_corpus

    rng = random.Random(seed)
    real = [
        t
        for name in ('movie', 'products', 'tweets')
        for t in (r['text'] for r in load_corpus(name))
        if len(words(t)) > 12
    ]
    texts = distinct(rng.sample(real, n // 2))
    for t in texts[: n - len(texts)]:
        w = t.split()
        for _ in range(rng.choice((1, 1, 2, 2, 3, 4))):
            at, kind = rng.randrange(len(w)), rng.random()
            if kind < 0.4:
                w[at] = rng.choice(real).split()[0]
            elif kind < 0.7:
                del w[at]
            else:
                w.insert(at, rng.choice(real).split()[0])
        texts.append(' '.join(w))
    texts += [t.upper() for t in texts[:40]] + ['Yes', 'yes!', '?!', 'no', '']
    rng.shuffle(texts)
    return texts


def read_all(folder):
    import gzip

    return [json.loads(line) for f in sorted(folder.glob('*.gz')) for line in gzip.open(f, 'rt', encoding='utf-8')]


@pytest.fixture(scope='module')
def datatrove_run(tmp_path_factory):
    "(texts, kept, removed): four files, four tasks, the script in a process of its own."
    pytest.importorskip('datatrove')
    folder, texts = tmp_path_factory.mktemp('datatrove'), planted_rows()
    (folder / 'rows').mkdir()
    for k in range(4):
        lines = [json.dumps(dict(text=t, row=i)) for i, t in enumerate(texts) if i % 4 == k]
        (folder / 'rows' / f'{k}.jsonl').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    script = write_datatrove(folder / 'dedup.py', folder / 'rows', folder / 'out', executor=Executor(tasks=4, workers=1))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return texts, *(read_all(folder / 'out' / name) for name in ('kept', 'removed'))


@pytest.fixture(scope='module')
def datatrove_clusters(datatrove_run):
    clusters = {}
    for r in sum(datatrove_run[1:], []):
        if (c := r['metadata'].get('minhash_cluster_id', -1)) not in (-1, None):
            clusters.setdefault(c, []).append(r['metadata']['row'])
    return {c: rows for c, rows in clusters.items() if len(rows) > 1}


def test_datatrove_loses_no_row_and_keeps_one_of_each_cluster(datatrove_run, datatrove_clusters):
    texts, kept, removed = datatrove_run
    assert sorted(r['metadata']['row'] for r in kept + removed) == list(range(len(texts)))
    gone = {r['metadata']['row'] for r in removed}
    assert all(len(set(rows) - gone) == 1 for rows in datatrove_clusters.values()) and gone <= {
        i for rows in datatrove_clusters.values() for i in rows
    }


def test_datatrove_finds_the_same_pairs(datatrove_run, datatrove_clusters):
    """What 'the same' means: datatrove does not verify, so its clusters are verified here. The pairs inside them whose exact Jaccard similarity is .8 or more
    are pairs of `near_duplicates`, all of them, and at most 2 % of those are missing. Texts with the same words count as one, and are in one cluster."""
    texts = datatrove_run[0]
    first, sets = {}, list(map(shingles, texts))
    same = [first.setdefault(tuple(words(t)), i) for i, t in enumerate(texts)]
    verified = {
        (min(p), max(p))
        for rows in datatrove_clusters.values()
        for i in rows
        for j in rows
        if i < j and jaccard(sets[i], sets[j]) >= 0.8 - 1e-9
        if len(set(p := (same[i], same[j]))) == 2
    }
    ours = {(same[a], same[b]) for a, b in pairs(near_duplicates(texts, 0.8)) if same[a] != same[b]}
    ours = {(min(p), max(p)) for p in ours}
    assert len(ours) > 500 and verified <= ours
    assert len(ours - verified) <= 0.02 * len(ours)
    cluster = {i: c for c, rows in datatrove_clusters.items() for i in rows}
    assert all(cluster[i] == cluster[f] for i, f in enumerate(same) if i != f and sets[i])


def test_datatrove_joins_what_lies_below_as_often_as_the_s_curve_says(datatrove_run, datatrove_clusters):
    texts = datatrove_run[0]
    bands, rows = choose_bands(0.8)
    cluster = {i: c for c, rows in datatrove_clusters.items() for i in rows}
    below = near_duplicates(texts, 0.5)
    # one near text only: nothing else can have joined the two
    alone = np.bincount(np.r_[below.a, below.b], minlength=len(texts)) == 1
    below = [
        (i, j, s)
        for i, j, s in zip(below.a.tolist(), below.b.tolist(), below.similarity)
        if s < 0.8 and alone[i] and alone[j]
    ]
    chance = s_curve(np.array([s for _, _, s in below]), bands, rows)
    joined = sum(cluster.get(i, -1) == cluster.get(j, -2) for i, j, _ in below)
    assert len(below) > 200 and abs(joined - chance.sum()) < 4 * np.sqrt((chance * (1 - chance)).sum())


@pytest.mark.parametrize('executor', ['local', 'slurm', 'ray'])
def test_every_executor_gets_a_script_that_compiles(tmp_path, executor):
    script = write_datatrove(
        tmp_path / 'dedup.py',
        's3://bucket/rows',
        "a folder's name",
        text_column='body',
        executor=Executor(executor, 1000, 50),
    )
    names = {}
    exec(
        compile(script.read_text(encoding='utf-8').split('# how a stage runs')[0].split('\n\n')[1], script, 'exec'),
        names,
    )
    compile(script.read_text(encoding='utf-8'), script, 'exec')
    assert (names['EXECUTOR'], names['OUTPUT'], names['TEXT'], names['TASKS'], names['WORKERS']) == (
        executor,
        "a folder's name",
        'body',
        1000,
        50,
    )
    assert (names['BANDS'], names['ROWS']) == choose_bands(0.8)


def test_bands_keep_the_recall():
    for threshold in (0.5, 0.7, 0.8, 0.9):
        bands, rows = choose_bands(threshold)
        assert s_curve(threshold, bands, rows) >= 0.98 and bands * rows <= 256
