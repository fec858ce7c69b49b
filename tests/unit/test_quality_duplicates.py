"Duplicates and leakage: the fast join against brute force, groups, keepers, crowds, containment."

import random

import numpy as np
from hypothesis import given, settings, strategies as st

from ftbook.data.split import normalise
from ftbook.quality.matches import group_rows
from ftbook.quality.groups import choose_keeper
from ftbook.quality.leaks import contained, leakage
from ftbook.quality.duplicates import exact_duplicates, find_duplicates
from ftbook.quality.minhash import jaccard, lsh_pairs, minhash, s_curve, shingles
from ftbook.quality.join import near_duplicates
from ftbook.quality.semantic import semantic_duplicates
from ftbook.quality.words import words
from cases.duplicates import distinct, pairs

vocabulary = "a b c d e f 1 ß ﬁ É 東 京 😀 שלום سلام ไทย don't x-y".split()
texts_strategy = st.lists(st.lists(st.sampled_from(vocabulary), max_size=12).map(' '.join), max_size=24)
any_text = st.text(st.characters(codec=None), max_size=30) | st.text("ab .,\n\x1e\x00\u0301é東😀ก", max_size=12)


def brute_force(texts, threshold, n_words=2):
    sets = [shingles(t, n_words) for t in texts]
    return {
        (i, j): jaccard(sets[i], sets[j])
        for j in range(len(sets))
        for i in range(j)
        if sets[i] and jaccard(sets[i], sets[j]) >= threshold - 1e-9
    }


# Words and shingles


@settings(max_examples=150, deadline=None)
@given(st.lists(any_text, max_size=8))
def test_hashes_are_those_of_the_words(texts):
    from ftbook.quality.hashes import _word_hashes

    hashes, counts = _word_hashes(texts)
    spelt = [w for t in texts for w in words(t)]
    assert counts.tolist() == [len(words(t)) for t in texts]
    assert len(set(zip(hashes.tolist(), spelt))) == len(set(spelt)) == len(set(hashes.tolist()))


def test_words_of_many_scripts():
    assert words("Don't  STOP—now!") == ['don', 't', 'stop', 'now']
    assert words('東京タワー') == list('東京タワー')
    assert words('सब ठीक है') == ['सब', 'ठीक', 'है']  # vowel signs are part of their words
    assert words('שלום, עולם') == ['שלום', 'עולם']
    assert words('ok😀😀') == ['ok', '😀', '😀'] and words(' ?! \0') == [] and words('\ud800') == []


# The join


@settings(max_examples=300, deadline=None)
@given(texts_strategy, st.sampled_from([0.3, 0.5, 0.6, 2 / 3, 0.75, 0.8, 0.9, 1.0]), st.integers(1, 4))
def test_near_duplicates_are_those_of_brute_force(texts, threshold, n_words):
    texts = distinct(texts)
    found, want = near_duplicates(texts, threshold, n_words=n_words), brute_force(texts, threshold, n_words)
    assert pairs(found) == set(want) and found.skipped == 0
    assert np.allclose(found.similarity, [want[p] for p in zip(found.a.tolist(), found.b.tolist())])


@settings(max_examples=100, deadline=None)
@given(texts_strategy, texts_strategy, st.sampled_from([0.5, 0.8]))
def test_across_two_lists_as_brute_force(left, right, threshold):
    left = distinct(left)
    found = near_duplicates(left, threshold, other=right)
    sets = list(map(shingles, left)), list(map(shingles, right))
    want = {
        (i, j) for i, x in enumerate(sets[0]) for j, y in enumerate(sets[1]) if x and jaccard(x, y) >= threshold - 1e-9
    }
    # linked to their copy at least
    same = {j for j, y in enumerate(right) if words(y) and words(y) in map(words, left)}
    got = pairs(found)
    assert got <= want and {p for p in want if p[1] not in same} <= got
    assert {j for _, j in want} == {j for _, j in got}


@settings(max_examples=60, deadline=None)
@given(texts_strategy, st.randoms(use_true_random=False))
def test_groups_do_not_depend_on_the_order(texts, rng):
    order = list(range(len(texts)))
    rng.shuffle(order)
    shuffled = near_duplicates([texts[i] for i in order], 0.6).groups()
    assert sorted(sorted(order[i] for i in g) for g in shuffled) == sorted(near_duplicates(texts, 0.6).groups())


@settings(max_examples=100, deadline=None)
@given(texts_strategy, st.sampled_from([0.5, 0.8]))
def test_a_crowd_makes_only_true_links_and_leaves_no_row_beside_its_leader(texts, threshold):
    texts = distinct(texts)
    found, want = near_duplicates(texts, threshold, crowd=1), brute_force(texts, threshold)
    assert pairs(found) <= set(want) and found.skipped == 0
    near = {i for p in want for i in p}
    assert {i for p in pairs(found) for i in p} <= near and bool(len(found)) == bool(want)


def test_shipped_sentences_as_brute_force():
    from ftbook.data.corpora import load_corpus

    texts = distinct(r['text'] for r in load_corpus('tweets'))[1500:2700]
    assert pairs(near_duplicates(texts, 0.5)) == set(brute_force(texts, 0.5))


def test_blocks_do_not_show(monkeypatch):
    from ftbook.quality import hashes, leaks

    texts = [f'row {i % 7} of {i % 5} and some more words' for i in range(60)] + ['', '?']
    want, blocks = near_duplicates(texts, 0.5), hashes._blocks
    inside = contained(texts[:9], texts, n_words=3, shortest=2)
    cut = []

    def small(texts):
        cut.append(list(blocks(texts, n_chars=50)))
        return cut[-1]

    monkeypatch.setattr(hashes, '_blocks', small)
    monkeypatch.setattr(leaks, '_blocks', small)
    got = near_duplicates(texts, 0.5)
    assert pairs(got) == pairs(want)
    assert pairs(contained(texts[:9], texts, n_words=3, shortest=2)) == pairs(inside)
    assert len(cut) > 1 and all(len(o) > 1 for o in cut[:1])


def test_many_identical_rows_cost_one_link_each():
    found = near_duplicates(['the same text again and again'] * 200_000)
    assert len(found) == 199_999 and found.groups() == [list(range(200_000))]
    assert len(exact_duplicates(['A  b', 'a B'] * 50_000)) == 99_999


def test_a_form_with_one_field_is_one_group():
    form = [
        f'Dear customer, your order {i} was sent today and will arrive at your door within the next three working days.'
        for i in range(30_000)
    ]
    found = near_duplicates(form)
    assert found.skipped == 0 and len(found) < 3 * len(form)
    assert found.groups() == [list(range(len(form)))]


def test_a_form_below_the_threshold_ends_in_good_time():
    form = [
        f'Dear customer, your order {i} was sent today and will arrive at your door within three working days.'
        for i in range(20_000)
    ]
    found = near_duplicates(form)  # 15 shingles of 19 are the same: 0.79
    assert len(found) == 0 and 0 < found.skipped < len(form) ** 2


def test_forms_with_two_fields_stay_apart():
    rng = random.Random(0)
    forms = [' '.join(rng.choices('abcdefghijklmnop', k=30)) for _ in range(20)]
    texts = [f'{form} {i}' for i in range(1000) for form in forms]
    groups = near_duplicates(texts, crowd=50).groups()
    assert [len(g) for g in groups] == [1000] * 20 and all(len({i % 20 for i in g}) == 1 for g in groups)


def test_comparisons_that_were_not_made_are_counted(monkeypatch):
    from ftbook.quality import join

    rng, crowd = random.Random(0), join._crowd
    texts = [' '.join(rng.sample('abcdefghijklmno', 10)) for _ in range(300)]
    monkeypatch.setattr(join, '_crowd', lambda *a: crowd(*a, n_leaders=2))
    assert near_duplicates(texts, 0.6, n_words=1, crowd=20).skipped > 0


def test_megabyte_rows_and_odd_ones():
    rng = random.Random(0)
    big = ' '.join(f'w{rng.randrange(10**6)}' for _ in range(150_000))
    texts = [big, big + ' and one more', 'x' * 10**6, '\0', '', '\ud800', '😀' * 1000, '😀' * 999]
    assert pairs(near_duplicates(texts)) == {(0, 1), (6, 7)}


# Groups and keepers


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=40))
def test_groups_are_connected_components(links):
    parent = {}

    def find(x):
        while parent.setdefault(x, x) != x:
            x = parent[x]
        return x

    for a, b in links:
        parent[find(a)] = find(b)
    want = {}
    for x in parent:
        want.setdefault(find(x), []).append(x)
    want = sorted((sorted(g) for g in want.values() if len(g) > 1), key=lambda g: (-len(g), g[0]))
    assert group_rows([a for a, _ in links], [b for _, b in links]) == want


@settings(max_examples=60, deadline=None)
@given(texts_strategy, st.randoms(use_true_random=False))
def test_every_row_is_in_one_group_at_most_and_counts_add_up(texts, rng):
    labels = [rng.choice('pn') for _ in texts]
    groups = find_duplicates(texts, labels)
    rows = [r for g in groups for r in g.rows]
    assert len(rows) == len(set(rows)) and all(g.keep in g.rows and len(g.rows) > 1 for g in groups)
    assert [g.conflict for g in groups] == sorted((g.conflict for g in groups), reverse=True)
    dropped = {r for g in groups for r in g.rows if r != g.keep}
    left = [t for i, t in enumerate(texts) if i not in dropped]
    assert len(dropped) + len(left) == len(texts) and len({normalise(t) for t in left}) == len(left)


def test_keepers():
    texts = ['good film', 'Good  film', 'a good film']
    assert choose_keeper([0, 1], texts) == (0, 'the first')
    assert choose_keeper([0, 1, 2], texts) == (2, 'the longest')
    assert choose_keeper([0, 1, 2], texts, ['p', 'p', 'n']) == (0, '2 of 3 say p; the longest')
    assert 'look at it' in choose_keeper([0, 2], texts, [1, None, 0])[1]


def test_semantic_groups_are_those_of_all_pairs():
    rng = np.random.default_rng(0)
    v = rng.normal(size=(500, 6)).astype('float32')
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    v[400:] = v[0]
    a, b = np.nonzero(np.triu(v @ v.T >= 0.97, 1))
    found = semantic_duplicates(v, 0.97)
    assert found.groups() == group_rows(a, b)
    assert (np.einsum('nd,nd->n', v[found.a], v[found.b]) >= 0.97 - 1e-5).all()
    assert len(semantic_duplicates(np.empty((0, 6)))) == 0


def test_semantic_groups_come_after_the_copies():
    v = np.array([[1, 0], [1, 0], [0.999, 0.0447], [0, 1]])
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    groups = find_duplicates(['a b', 'A b', 'other words', 'far away'], vectors=v)
    assert [(g.rows, g.kind) for g in groups] == [([0, 1], 'exact'), ([0, 2], 'semantic')]


# MinHash


def test_minhash_estimates_jaccard():
    a, b = set(range(100)), set(range(20, 120))
    guesses = [(np.equal(*minhash([a, b], seed=s))).mean() for s in range(40)]
    assert abs(np.mean(guesses) - jaccard(a, b)) < 3 * np.sqrt(0.25 / 128 / 40)


def test_banding_follows_the_s_curve():
    rng = np.random.default_rng(0)
    left = rng.integers(2**60, size=(3000, 32))
    right = np.where(rng.random(left.shape) < 0.7, left, rng.integers(2**60, size=left.shape))
    hits = sum((i, i + 3000) in pairs_ for pairs_ in [lsh_pairs(np.concatenate([left, right]), 8)] for i in range(3000))
    assert abs(hits / 3000 - s_curve(0.7, 8, 4)) < 0.04


# Leakage


def test_contained_as_brute_force():
    rng = random.Random(0)
    word = lambda: rng.choice('abcdefgh')
    train = [' '.join(word() for _ in range(rng.randrange(40))) for _ in range(120)]
    test = [' '.join(word() for _ in range(rng.randrange(12))) for _ in range(60)] + [t[5:25] for t in train[:20]]

    def runs(t, n):
        return {tuple(words(t)[i : i + n]) for i in range(len(words(t)) - n + 1)}

    want = {}
    for j, t in enumerate(test):
        n = min(4, len(words(t)))
        if n < 2:
            continue
        for i, r in enumerate(train):
            share = len(runs(t, n) & runs(r, n)) / len(runs(t, n))
            if share >= 0.5:
                want[i, j] = share
    got = contained(test, train, n_words=4, shortest=2)
    assert pairs(got) == set(want) and got.skipped == sum(len(words(t)) < 2 for t in test)
    assert np.allclose(got.similarity, [want[p] for p in zip(got.a.tolist(), got.b.tolist())])


def test_leakage_names_the_rows_and_the_kind():
    story = ' '.join(f'w{i}' for i in range(60))
    inner = ' '.join(f'w{i}' for i in range(20, 45))
    nearly = story.replace('w30', 'other')
    train = ['unrelated text about the weather', story, 'short one', story]
    found = leakage(train, [inner, 'SHORT  one', nearly, 'nothing of the kind here at all', ''])
    assert [(f['test'], f['train'], f['kind']) for f in found] == [(1, 2, 'exact'), (2, 1, 'near'), (0, 1, 'contained')]
    assert found[2]['similarity'] == 1 and leakage([], ['a']) == [] == leakage(['a'], [])


def test_a_frame_around_every_test_is_no_leak():
    frame = 'please read the following question with care and answer it in one single word only thank you'
    tests = [
        f'{frame} what is the {a} of {b}' for a in 'colour size age price weight'.split() for b in map(str, range(60))
    ]
    train = [f'{frame} who wrote the book number {i}' for i in range(50)]
    assert len(contained(tests, train, threshold=0.4)) == 0 and len(contained(tests[:20], train, threshold=0.4)) > 0
    assert {7} < set(contained(tests, [tests[7]]).b.tolist()) <= set(range(60))  # those with the same attribute
