"""The runs of `domains.ipynb`: train on one domain, test on all four.

    python domains_worker.py             every run that is missing, appended to results/domains.json one by one
    python domains_worker.py HOW A SEED  one run; prints one line of JSON

HOW is 'frozen' (MiniLM-L6 as it is, logistic regression on top) or 'smollm2' (SmolLM2-135M, LoRA on all linear layers).
"""

import json, os, platform, random, subprocess, sys, time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
import numpy as np

HERE = Path(__file__).resolve().parent
RESULTS = HERE / 'results' / 'domains.json'
DOMAINS = 'movie', 'products', 'tweets', 'newspaper'
LABELS = 'negative', 'positive'
SEEDS = dict(frozen=10, smollm2=3)  # runs of each training domain
SIZES = dict(frozen=(600, 360), smollm2=(400, 200))  # rows to train and to test on, half of each label
TRAINING = dict(rank=16, alpha=32, lr=1e-3, batch_size=16, epochs=2)
INSTRUCTION = 'Is the sentiment {labels}?'
PACKAGES = 'torch', 'transformers', 'scikit-learn', 'numpy'


# Results


def read(path=RESULTS):
    return json.loads(path.read_text(encoding='utf-8')) if path.exists() else dict(machines=[], runs=[])


def cpu_name():
    lines = Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else []
    return next((l.split(':')[1].strip() for l in lines if l.startswith('model name')), platform.processor())


def where(packages=PACKAGES):
    commit = subprocess.run(
        ['git', 'rev-parse', '--short', 'HEAD'], cwd=HERE, capture_output=True, text=True
    ).stdout.strip()
    return dict(cpu=cpu_name(), cores=os.cpu_count(), commit=commit, versions={p: version(p) for p in packages})


def append(runs, path=RESULTS, packages=PACKAGES):
    """Add finished runs, with the number of the machine that made them; the file is never seen half written, and two
    writers take turns."""
    from filelock import FileLock
    from ftbook.files import cache_dir

    path.parent.mkdir(exist_ok=True)
    with FileLock(cache_dir() / f'{path.name}.lock'):
        data, here = read(path), where(packages)
        if here not in data['machines']:
            data['machines'].append(here)
        data['runs'] += [run | dict(machine=data['machines'].index(here)) for run in runs]
        lines = ',\n'.join(json.dumps(run) for run in data['runs'])
        beside = path.with_suffix('.writing')
        beside.write_text(f'{{"machines": {json.dumps(data["machines"])},\n"runs": [\n{lines}\n]}}\n', encoding='utf-8')
        os.replace(beside, path)


# Rows


def article(row):
    return row['id'].split('_')[0]  # sentences of one article, or of one review, stay on one side


def balanced(rows, n):
    "The first n rows, half of each label, shuffled already; ValueError where there are too few."
    halves = [[r for r in rows if r['label'] == label][: n // 2] for label in LABELS]
    if any(len(half) < n // 2 for half in halves):
        raise ValueError(f'{n} balanced rows were asked for, there are {[len(half) for half in halves]}')
    return [r for pair in zip(*halves) for r in pair]


def labelled(name):
    "Unique rows whose mean rating is 1 or more from zero, with a label."
    from ftbook.data.split import deduplicate
    from ftbook.data.corpora import load_corpus

    return [
        r | dict(label=LABELS[r['rating'] > 0])
        for r in deduplicate(load_corpus(name), key='text')
        if abs(r['rating']) >= 1
    ]


def split(name, seed, n_train, n_test):
    "(train, test), balanced, with no article on both sides."
    from ftbook.data.split import split_rows

    rows = labelled(name)
    train, test = split_rows(rows, round(0.38 * len(rows)), seed=seed, key=article)
    return balanced(train, n_train), balanced(test, n_test)


# The two ways


def frozen(domain, seed, embedded={}):
    "Accuracy and cross-entropy, in bits, on every domain, of logistic regression over MiniLM as it is."
    from ftbook.models.load import embed, load_encoder
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    if not embedded:
        encoder, tokenizer = load_encoder('minilm-l6', device='cpu')
        for name in DOMAINS:
            embedded[name] = dict(
                zip(
                    (r['id'] for r in labelled(name)),
                    embed(encoder, tokenizer, [r['text'] for r in labelled(name)]).numpy(),
                )
            )

    def arrays(rows, name):
        return np.stack([embedded[name][r['id']] for r in rows]), np.array([r['label'] for r in rows])

    X, y = arrays(split(domain, seed, *SIZES['frozen'])[0], domain)
    head = LogisticRegression(C=3.0, max_iter=2000).fit(X, y)
    found = {}
    for name in DOMAINS:
        X, y = arrays(split(name, seed, *SIZES['frozen'])[1], name)
        found[name] = dict(accuracy=float(head.score(X, y)), bits=float(log_loss(y, head.predict_proba(X)) / np.log(2)))
    return found


def smollm2(domain, seed):
    "The same of SmolLM2-135M, fine-tuned with LoRA; it chooses the more probable of the two answers."
    import torch
    from ftbook.data.rows import classification_row
    from ftbook.data.encoding import encode
    from ftbook.data.examples import prompt_ids
    from ftbook.methods.lora_method import LoRA
    from ftbook.models.load import load_model
    from ftbook.forgetting.choices import choice_ids, choice_scores
    from ftbook.training.tune import finetune

    def row(r):
        return classification_row(r['text'], r['label'], INSTRUCTION, LABELS)

    model, tokenizer = load_model('smollm2-135m', dtype='float32', device='cpu')
    LoRA(rank=TRAINING['rank'], alpha=TRAINING['alpha'], seed=seed).apply(model)
    train = split(domain, seed, *SIZES['smollm2'])[0]
    finetune(
        model,
        encode([row(r) for r in train], tokenizer),
        lr=TRAINING['lr'],
        batch_size=TRAINING['batch_size'],
        epochs=TRAINING['epochs'],
        seed=seed,
        progress=False,
    )
    found = {}
    for name in DOMAINS:
        test = split(name, seed, *SIZES['smollm2'])[1]
        prompts, y = (
            [prompt_ids(row(r), tokenizer) for r in test],
            torch.tensor([LABELS.index(r['label']) for r in test]),
        )
        scores = choice_scores(model, prompts, choice_ids(row(test[0]), LABELS, tokenizer))
        bits = torch.nn.functional.cross_entropy(scores.log_softmax(1), y).item() / np.log(2)
        found[name] = dict(accuracy=(scores.argmax(1) == y).float().mean().item(), bits=float(bits))
    return found


def one(how, domain, seed):
    start = time.perf_counter()
    found = dict(frozen=frozen, smollm2=smollm2)[how](domain, seed)
    return dict(
        how=how,
        train=domain,
        seed=seed,
        tests={name: {k: round(v, 4) for k, v in f.items()} for name, f in found.items()},
        rows=SIZES[how][0],
        test_rows=SIZES[how][1],
        seconds=round(time.perf_counter() - start, 1),
    )


def missing():
    "What is not in the file yet, the cheap runs first, then seed by seed."
    done = {(r['how'], r['train'], r['seed']) for r in read()['runs']}
    return [
        job
        for how, seeds in SEEDS.items()
        for seed in range(seeds)
        for domain in DOMAINS
        if (job := (how, domain, seed)) not in done
    ]


def worker(how, domain, seed):
    "One run, in a process of its own."
    done = subprocess.run([sys.executable, __file__, how, domain, str(seed)], capture_output=True, text=True, cwd=HERE)
    if done.returncode:
        raise RuntimeError(f'{how} {domain} {seed}: {done.stderr[-2000:]}')
    return json.loads(done.stdout.splitlines()[-1])


def measure(how, domain, seed):
    append([one(how, domain, seed) if how == 'frozen' else worker(how, domain, seed)])


if __name__ == '__main__':
    if len(sys.argv) == 4:
        print(json.dumps(one(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
    else:
        for job in missing():
            measure(*job)
