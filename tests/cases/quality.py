"Rows for an audit."

import json

from ftbook.quality.audit import audit, AuditOptions

good = [
    "The film was long, and the plot had more holes than a sieve.",
    "A warm and patient portrait of two sisters.",
    "Nothing in it is true, and nothing in it is funny.",
    "The songs are better than the story that holds them together.",
]


def labelled(texts, labels=None):
    return [dict(text=t, label=l) for t, l in zip(texts, labels or ['pos', 'neg'] * len(texts))]


def quick(data, **more):
    options = AuditOptions(benchmarks=more.pop('benchmarks', ()))
    return audit(data, encoder=None, progress=False, options=options, **more)


def write(path, rows):
    import csv, pyarrow as pa, pyarrow.parquet as pq

    if path.suffix == '.parquet':
        return pq.write_table(pa.Table.from_pylist(rows), path)
    if path.suffix == '.json':
        return path.write_text(json.dumps(rows))
    if path.suffix == '.jsonl':
        return path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
    with path.open('w', newline='') as f:
        writer = csv.DictWriter(f, list(rows[0]), delimiter='\t' if path.suffix == '.tsv' else ',')
        writer.writeheader()
        writer.writerows(rows)
