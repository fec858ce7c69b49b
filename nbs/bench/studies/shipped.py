"""What the audit finds in the shipped sentiment rows, in which nobody planted anything.

The label is the sign of the mean of all raters where that is beyond one half.
"""

import time

from tasks import DOMAINS, LABELS

KEY = ('domain',)
PACKAGES = 'torch', 'transformers', 'scikit-learn', 'numpy'
PER_PROCESS = 4


def plan(runs):
    "Each domain once."
    for domain in DOMAINS:
        yield dict(domain=domain)


def run(job):
    "The findings of one domain, each with its first four rows."
    from ftbook.data.corpora import load_corpus
    from ftbook.quality.audit import audit

    start = time.perf_counter()
    rated = [r for r in load_corpus(job['domain']) if abs(r['rating']) > 0.5]
    rows = [dict(text=r['text'], label=LABELS[r['rating'] > 0]) for r in rated]
    found = audit(rows, progress=False)
    return dict(
        rows=len(rows),
        sentence=found.sentence(),
        findings=[told(f, rows) for f in found.findings],
        seconds=round(time.perf_counter() - start, 1),
    )


def told(finding, rows):
    "A finding as fields of a run."
    worst = [
        dict(row=int(i), text=rows[i]['text'][:200], label=rows[i]['label'], why=str(why))
        for i, why in list(zip(finding.rows, finding.evidence))[:4]
    ]
    return dict(
        level=finding.level,
        where=finding.where,
        message=finding.message,
        rows=len(finding.rows),
        drop=len(finding.drop),
        worst=worst,
    )
