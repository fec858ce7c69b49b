"""Near duplicates: ftbook against datasketch, rensa and SemHash, ten thousand to a million short texts, one core.

Every library gets the same texts and looks for pairs whose sets of two-word shingles have a Jaccard similarity of 0.8
or more.
"""

import os, random, re, resource, sys, time
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path

KEY = 'library', 'n', 'seed'
PACKAGES = 'datasketch', 'rensa', 'semhash', 'numpy'
ALONE = 0.05
RESERVE = 1.5e9
THREADS = 1
SIZES = 10_000, 100_000, 1_000_000
AGAIN = 'ftbook', 'datasketch', 'rensa_two_steps', 'rensa_hashed'  # measured twice, at 100,000
THRESHOLD, BANDS, ROWS = 0.8, 18, 7  # 126 hashes: a pair at 0.8 is found with probability 0.986
DIM, MARGIN = 256, 0.1  # of the vectors for semhash, and what their cosine may lack
WORD = re.compile(r'[^\W_]+')


def plan(runs):
    "Variants take turns; a round has its own texts."
    for n in SIZES:
        for seed in range(6):
            for library in LIBRARIES:
                if seed < rounds_of(library, n):
                    yield dict(library=library, n=n, seed=seed)


def rounds_of(library, n):
    if n == 10**6:
        return dict(datasketch=1, semhash=0, ftbook=5).get(library, 2)
    if n == 10**5 and library in AGAIN:
        return 6
    return 0 if n == 10**5 and library == 'semhash' else 3


def run(job):
    "One search, on one core."
    n, seed = job['n'], job['seed']
    # some libraries read no thread variable
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    search, (texts, planted) = LIBRARIES[job['library']], documents(n, seed)
    start = time.perf_counter()
    search(documents(100, seed + 1000)[0], Clock())  # imports, and tables that are made once
    first = time.perf_counter() - start
    forget_peak()
    before, clock, cpu = highest(), Clock(), time.process_time()
    found = search(texts, clock)
    cpu, peak = time.process_time() - cpu, highest()
    return dict(
        seconds=sum(clock.values()),
        cpu_seconds=cpu,
        first_seconds=first,
        stages=clock,
        peak_bytes=peak,
        above_texts=peak - before,
        **judge(texts, planted, found),
    )


# The texts


def shingles(text):
    "Two-word shingles as strings: what the libraries are given, and what the truth is counted by."
    w = WORD.findall(text.casefold())
    return list(map(' '.join, zip(w, w[1:]))) or w


@lru_cache(1)
def vocabulary():
    """The shipped corpora as one running text, without the words that a regular expression and Unicode's categories cut
    differently."""
    from ftbook.data.corpora import load_corpus
    from ftbook.quality.words import words

    texts = [
        r.get('text') or r['definition']
        for name in ('movie', 'products', 'tweets', 'newspaper', 'jargon', 'foldoc')
        for r in load_corpus(name)
    ]
    running = ' '.join(texts).split()
    plain = {w for w in set(running) if (found := words(w)) and found == WORD.findall(w.casefold())}
    return [w for w in running if w in plain]


def edited(words, rng, running):
    "One to four words changed, dropped or added: pairs on both sides of the threshold."
    w = list(words)
    for _ in range(rng.choice((1, 1, 2, 2, 3, 4))):
        at, kind = rng.randrange(len(w)), rng.random()
        if kind < 0.4:
            w[at] = rng.choice(running)
        elif kind < 0.7:
            del w[at]
        else:
            w.insert(at, rng.choice(running))
    return w


def documents(n, seed=0):
    "n texts of about 20 words, each two stretches of the corpora; a third of them edited copies of the one before."
    rng, running, texts, planted = random.Random(seed), vocabulary(), [], []

    def stretch():
        return running[(at := rng.randrange(len(running) - 12)) : at + rng.randint(8, 12)]

    while len(texts) < n:
        words = stretch() + stretch()
        texts.append(' '.join(words))
        if len(texts) < n and rng.random() < 0.5:
            planted.append((len(texts) - 1, len(texts)))
            texts.append(' '.join(edited(words, rng, running)))
    return texts, planted


# What a search takes


def forget_peak():
    "Let the highest resident size start anew, where the kernel can."
    try:
        Path('/proc/self/clear_refs').write_text('5')
    except OSError:
        pass


def highest():
    "The highest resident size, in bytes."
    status = Path('/proc/self/status')
    if status.exists():
        return next(int(l.split()[1]) * 1024 for l in status.read_text().splitlines() if l.startswith('VmHWM'))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


class Clock(dict):
    "Seconds by stage."

    def __init__(self):
        self.last = time.perf_counter()

    def lap(self, name):
        now = time.perf_counter()
        self[name] = self.get(name, 0.0) + now - self.last
        self.last = now


# The libraries


def verified(candidates, shingled, clock):
    "The candidates whose exact Jaccard similarity reaches the threshold."
    found = []
    for i, j in candidates:
        a, b = set(shingled[i]), set(shingled[j])
        if len(a & b) >= THRESHOLD * len(a | b) - 1e-9:
            found.append((i, j))
    clock.lap('verify')
    return found


def ftbook(texts, clock):
    from ftbook.quality.join import near_duplicates

    found = near_duplicates(texts, THRESHOLD)
    clock.lap('all')
    return list(zip(found.a.tolist(), found.b.tolist()))


def datasketch(texts, clock):
    from datasketch import MinHash, MinHashLSH

    shingled = [shingles(t) for t in texts]
    clock.lap('shingle')
    lsh, candidates, n = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS)), [], BANDS * ROWS
    clock.last = time.perf_counter()
    for i, sketch in enumerate(MinHash.generator(([x.encode() for x in s] for s in shingled), num_perm=n)):
        candidates += [(j, i) for j in lsh.query(sketch)]
        lsh.insert(i, sketch, check_duplication=False)
    clock.lap('sketch and search')
    return verified(candidates, shingled, clock)


def rensa_search(flagged, clock, sizes=(BANDS * ROWS, BANDS)):
    "Candidates among some rows: {row: its shingles}."
    from rensa import RMinHash, RMinHashLSH

    rows, n_hashes = list(flagged), sizes[0]
    sketches, lsh = (
        RMinHash.from_token_sets(list(flagged.values()), num_perm=n_hashes, seed=0),
        RMinHashLSH(threshold=THRESHOLD, num_perm=n_hashes, num_bands=sizes[1]),
    )
    lsh.insert_many(sketches)
    found = [(rows[j], rows[i]) for i, near in enumerate(lsh.query_all(sketches)) for j in near if j < i]
    clock.lap('sketch and search')
    return found


def rensa(texts, clock):
    "As a reader of its manual would: sketches, index, query, then the exact check."
    shingled = [shingles(t) for t in texts]
    clock.lap('shingle')
    return verified(rensa_search(dict(enumerate(shingled)), clock), shingled, clock)


def rensa_two_steps(texts, clock):
    "The fastest way to pairs that was found: flags for all rows in one call, the slower query for flagged rows only."
    from rensa import RMinHash, RMinHashLSH

    shingled = [shingles(t) for t in texts]
    clock.lap('shingle')
    # the same sketches as in the second step
    matrix = RMinHash.digest_matrix_from_token_sets(shingled, num_perm=BANDS * ROWS, seed=0)
    flags = RMinHashLSH(
        threshold=THRESHOLD, num_perm=BANDS * ROWS, num_bands=BANDS
    ).query_duplicate_flags_matrix_one_shot(matrix)
    return verified(rensa_search({i: shingled[i] for i, flag in enumerate(flags) if flag}, clock), shingled, clock)


def rensa_hashed(texts, clock):
    "The same with shingles hashed by numpy, which rensa takes as they are."
    import numpy as np
    from rensa import RMinHash, RMinHashLSH

    found = re.findall(r'[^\W_]+|\n', '\n'.join(t.replace('\n', ' ') for t in texts).casefold() + '\n')
    hashes = np.fromiter(map(hash, found), np.int64, len(found)).view(np.uint64)
    ends = np.flatnonzero(hashes == np.array(hash('\n')).view(np.uint64))
    runs = hashes[:-1] * np.uint64(0x9E3779B97F4A7C15) + np.roll(hashes[:-1], -1)
    runs = np.delete(runs, np.r_[ends[:-1], ends[:-1] - 1, ends[-1] - 1])  # what reaches over the end of a text
    offsets = np.r_[0, ends - 2 * np.arange(1, len(ends) + 1) + 1]
    clock.lap('shingle')
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(runs, offsets.astype(np.uint64), BANDS * ROWS, 0)
    flags = RMinHashLSH(
        threshold=THRESHOLD, num_perm=BANDS * ROWS, num_bands=BANDS
    ).query_duplicate_flags_matrix_one_shot(matrix)
    raw, at = runs.tobytes(), (8 * offsets).tolist()
    flagged = {i: [raw[k : k + 8] for k in range(at[i], at[i + 1], 8)] for i, flag in enumerate(flags) if flag}
    return verified(rensa_search(flagged, clock), flagged, clock)


def rensa_flags(texts, clock):
    "Rows are flagged, nobody says of which other row they are a copy, and nothing is verified."
    from rensa import RMinHash, RMinHashLSH

    shingled = [shingles(t) for t in texts]
    clock.lap('shingle')
    matrix = RMinHash.digest_matrix_from_token_sets(shingled, num_perm=BANDS * ROWS, seed=0)
    flags = RMinHashLSH(
        threshold=THRESHOLD, num_perm=BANDS * ROWS, num_bands=BANDS
    ).query_duplicate_flags_matrix_one_shot(matrix)
    clock.lap('sketch and search')
    return {i for i, flag in enumerate(flags) if flag}


def rensa_rho(texts, clock):
    "Flags by sampled shingles, with the sizes of rensa's own benchmark: 128 hashes, 8 bands."
    from rensa import RMinHash, RMinHashLSH

    shingled = [shingles(t) for t in texts]
    clock.lap('shingle')
    matrix = RMinHash.digest_matrix_from_token_sets_rho(shingled, num_perm=128, seed=0)
    flags = RMinHashLSH(threshold=THRESHOLD, num_perm=128, num_bands=8).query_duplicate_flags_matrix_one_shot(matrix)
    clock.lap('sketch and search')
    return {i for i, flag in enumerate(flags) if flag}


class ShingleEncoder:
    """Texts to vectors whose cosine grows with the shingles that they share: each shingle adds or takes one at a place
    of its own."""

    def __init__(self, dim=DIM):
        self.dim = dim

    def encode(self, texts, **options):
        import numpy as np

        shingled = [set(shingles(t)) for t in texts]
        hashes = np.fromiter((hash(x) for s in shingled for x in s), np.int64)
        row = np.repeat(np.arange(len(texts)), [len(s) for s in shingled])
        places, signs = row * self.dim + (hashes >> 1) % self.dim, 1 - 2 * (hashes & 1)
        return np.bincount(places, signs, minlength=len(texts) * self.dim).astype(np.float32).reshape(-1, self.dim)


def semhash(texts, clock):
    """SemHash over vectors of shingles: sets with a Jaccard similarity of t have a cosine of 2t/(1 + t) or more; less
    is asked for, as the vectors are short."""
    from semhash import SemHash

    rows = [dict(text=t, row=str(i)) for i, t in enumerate(texts)]
    index = SemHash.from_records(rows, columns=['text'], model=ShingleEncoder())
    clock.lap('index')
    found = index.self_deduplicate(threshold=2 * THRESHOLD / (1 + THRESHOLD) - MARGIN).filtered
    candidates = [(int(f.duplicate_of['row']), int(f.record['row'])) for f in found]
    clock.lap('sketch and search')
    shingled = {i: shingles(texts[i]) for i in {i for pair in candidates for i in pair}}
    return verified(candidates, shingled, clock)


# The truth


def similarity(texts, i, j):
    a, b = set(shingles(texts[i])), set(shingles(texts[j]))
    return len(a & b) / len(a | b)


def every_pair(texts):
    "All pairs at or above the threshold, by counting common shingles: for small n only."
    where, sets = defaultdict(list), [set(shingles(t)) for t in texts]
    for i, s in enumerate(sets):
        for x in s:
            where[x].append(i)
    found = set()
    for i, s in enumerate(sets):
        common = Counter(j for x in s for j in where[x] if j < i)
        found |= {(j, i) for j, k in common.items() if k >= THRESHOLD * (len(s) + len(sets[j]) - k) - 1e-9}
    return found


def judge(texts, planted, found):
    "Recall on the planted pairs (on all pairs where n is small), precision on everything that was reported."
    true = {p for p in planted if similarity(texts, *p) >= THRESHOLD - 1e-9}
    if isinstance(found, set):  # flags
        rows = {i for p in true for i in p}
        small = {i for p in every_pair(texts) for i in p} if len(texts) <= 20_000 else None
        return dict(
            true=len(rows),
            reported=len(found),
            recall=len(rows & found) / len(rows),
            precision=small and len(found & small) / max(1, len(found)),
        )
    got = {(min(p), max(p)) for p in found}
    right = sum(similarity(texts, *p) >= THRESHOLD - 1e-9 for p in got)
    every = every_pair(texts) if len(texts) <= 20_000 else None
    return dict(
        true=len(true),
        near_misses=sum(THRESHOLD - 0.1 <= similarity(texts, *p) < THRESHOLD - 1e-9 for p in planted),
        reported=len(got),
        recall=len(true & got) / len(true),
        precision=right / max(1, len(got)),
        recall_of_all=every and len(every & got) / len(every),
    )


LIBRARIES = dict(
    ftbook=ftbook,
    datasketch=datasketch,
    rensa=rensa,
    rensa_two_steps=rensa_two_steps,
    rensa_hashed=rensa_hashed,
    rensa_flags=rensa_flags,
    rensa_rho=rensa_rho,
    semhash=semhash,
)
