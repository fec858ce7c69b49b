"""How many rows, and how good: accuracy against the number of examples, and against the quality of their labels.

A part is 'curve', 'noise' (n clean rows against 2n and 4n noisy ones) or 'audit' (what was flagged is left out). `how` is 'frozen'
(MiniLM-L6 as it is, logistic regression on top), 'minilm' (all of MiniLM-L6 trained) or 'smollm2' (SmolLM2-135M, LoRA on all
linear layers).
"""

import random, time

import numpy as np

from tasks import LABELS, arrays, head, labels_of, split_task

KEY = 'part', 'how', 'task', 'seed', 'n', 'detail'
PACKAGES = 'torch', 'transformers', 'scikit-learn', 'numpy'
PER_PROCESS = 4
SURVEY_TASKS = 'movie', 'products', 'tweets', 'newspaper'
TASKS = *SURVEY_TASKS, 'newsgroups'
SIZES = 16, 32, 64, 128, 256, 512, 1024, 2048, 4096  # rows to train on, as far as the task has them
SEEDS = dict(frozen=10, minilm=5, smollm2=5)
NOISE_TASKS, NOISE_SIZES = ('movie', 'products', 'tweets'), (32, 64, 128, 256)
LEVELS = 'all raters', 'four raters', 'one rater', '10 % wrong', '20 % wrong', '30 % wrong', '40 % wrong'
AUDIT_SIZES, AUDIT_LEVELS = (128, 256, 512, 1024), ('one rater', '10 % wrong', '20 % wrong', '30 % wrong')
TRAINING = dict(
    smollm2=dict(lr=5e-4, batch_size=8, epochs=2, least=240), minilm=dict(lr=1e-4, batch_size=16, epochs=4, least=480)
)
N_TESTED = 300  # held-out rows that a fine-tuned model answers


def plan(runs):
    """Every run, in order: every task and seed at one size before the next; what a frozen encoder does in seconds comes
    late."""
    for job in jobs():
        yield dict(zip(KEY, job))


def run(job):
    "Scores by size or by kind of labels."
    start = time.perf_counter()
    arguments = [job[k] for k in ('task', 'seed', 'n', 'detail')]
    if job['how'] == 'frozen':
        scores = dict(curve=frozen_curve, noise=frozen_noise, audit=frozen_audit)[job['part']](*arguments)
    else:
        scores = tuned(job['how'], *arguments)
    return dict(
        scores={k: round(float(v), 4) for k, v in scores.items()}, seconds=round(time.perf_counter() - start, 1)
    )


def jobs():
    "The runs, as the values of KEY."

    def curve(how, sizes, tasks=('movie', 'tweets', 'newsgroups')):
        return (
            ('curve', how, task, seed, n, 'all raters')
            for n in sizes
            for seed in range(SEEDS[how])
            for task in tasks
            if n >= 32 or task != 'newsgroups'
        )

    yield from curve('smollm2', (32, 128))
    yield from curve('minilm', (32, 128, 512))
    yield from curve('smollm2', (256,))
    yield from (
        ('noise', 'smollm2', 'movie', seed, n, level)
        for seed in range(SEEDS['smollm2'])
        for level in ('20 % wrong', 'one rater')
        for n in (64, 128, 256)
    )
    yield from curve('smollm2', (512, 64, 16))
    yield from (('curve', 'frozen', task, seed, 0, '') for task in TASKS for seed in range(SEEDS['frozen']))
    yield from (
        ('noise', 'frozen', task, seed, n, '')
        for task in NOISE_TASKS
        for n in NOISE_SIZES
        for seed in range(SEEDS['frozen'])
    )
    yield from (
        ('audit', 'frozen', task, seed, n, '')
        for task in NOISE_TASKS
        for n in AUDIT_SIZES
        for seed in range(SEEDS['frozen'])
    )
    yield from curve('minilm', (64, 256, 1024, 16))


def sizes_of(task):
    return [
        n
        for n in SIZES
        if all(len(split_task(task, seed)[0]) >= n for seed in range(SEEDS['frozen']))
        and (task != 'newsgroups' or n >= 32)
    ]


def vote(row, n_raters, rng):
    "What n raters, drawn from the row's own, call it together; a draw is settled by lot."
    total = sum(np.sign(rng.sample(row['ratings'], n_raters)))
    return LABELS[int(total > 0)] if total else rng.choice(LABELS)


def noisy(rows, level, seed):
    "The rows' labels at a level of `LEVELS`."
    rng = random.Random(f'{seed} {level}')
    if level == 'all raters':
        return [r['label'] for r in rows]
    if level.endswith(('raters', 'rater')):
        return [vote(r, dict(one=1, four=4)[level.split()[0]], rng) for r in rows]
    share = int(level.split()[0]) / 100
    wrong = set(rng.sample(range(len(rows)), round(share * len(rows))))
    return [LABELS[r['label'] == LABELS[0]] if i in wrong else r['label'] for i, r in enumerate(rows)]


def frozen_curve(task, seed, n, detail):
    train, test = split_task(task, seed)
    X, y, T = arrays(task, train[: max(sizes_of(task))]), [r['label'] for r in train], arrays(task, test)
    return {str(k): head(X[:k], y[:k]).score(T, [r['label'] for r in test]) for k in sizes_of(task)}


def frozen_noise(task, seed, n, detail):
    "Accuracy by level and by how many times n rows there were."
    train, test = split_task(task, seed)
    X, T, truth = arrays(task, train[: 4 * n]), arrays(task, test), [r['label'] for r in test]
    return {
        f'{level} x {times}': head(X[: times * n], noisy(train[: times * n], level, seed)).score(T, truth)
        for level in LEVELS
        for times in (1, 2, 4)
    }


def audited(X, labels, keep):
    return head(X[keep], labels[keep]) if len(set(labels[keep])) > 1 else head(X, labels)


def frozen_audit(task, seed, n, detail):
    """Accuracy as the rows came, with the flagged ones left out, with as many left out by lot, and with all wrong ones
    left out."""
    from ftbook.quality.labels import flag_labels, out_of_fold

    train, test = split_task(task, seed)
    rows = train[:n]
    X, T, truth, right, found = (
        arrays(task, rows),
        arrays(task, test),
        [r['label'] for r in test],
        np.array([r['label'] for r in rows]),
        {},
    )
    for level in AUDIT_LEVELS:
        labels = np.array(noisy(rows, level, seed))
        bad, wrong = flag_labels(labels.tolist(), out_of_fold(X, labels.tolist(), seed=seed, C=10)), labels != right
        lot = np.random.default_rng(seed).permutation(bad)
        for name, keep in {
            'as they came': bad | True,
            'audited': ~bad,
            'as many by lot': ~lot,
            'without the wrong ones': ~wrong,
        }.items():
            found[f'{level}: {name}'] = audited(X, labels, keep).score(T, truth)
        found[f'{level}: wrong'], found[f'{level}: flagged'], found[f'{level}: flagged and wrong'] = (
            float(x.mean()) for x in (wrong, bad, bad & wrong)
        )
    return found


def epochs_for(how, n):
    return max(TRAINING[how]['epochs'], TRAINING[how]['least'] / n)


def tune_smollm2(task, rows, labels, test, seed):
    "SmolLM2-135M with LoRA; it chooses the most probable answer."
    import torch
    from ftbook.data.rows import classification_row
    from ftbook.data.encoding import encode
    from ftbook.data.examples import prompt_ids
    from ftbook.methods.lora_method import LoRA
    from ftbook.models.load import load_model
    from ftbook.forgetting.choices import choice_ids, choice_scores
    from ftbook.training.tune import finetune

    def row(r, label):
        if task == 'newsgroups':
            return dict(prompt=f"{r['text']}\nNewsgroup:", completion=f' {label}')
        return classification_row(r['text'], label, 'Is the sentiment {labels}?', LABELS)

    names, t = labels_of(task), TRAINING['smollm2']
    model, tokenizer = load_model('smollm2-135m', device='cpu')
    LoRA(rank=16, alpha=32, seed=seed).apply(model)
    finetune(
        model,
        encode([row(r, l) for r, l in zip(rows, labels)], tokenizer),
        lr=t['lr'],
        batch_size=t['batch_size'],
        epochs=epochs_for('smollm2', len(rows)),
        seed=seed,
        progress=False,
    )
    answers = [f' {l}' for l in names] if task == 'newsgroups' else names
    scores = choice_scores(
        model,
        [prompt_ids(row(r, names[0]), tokenizer) for r in test],
        choice_ids(row(test[0], names[0]), answers, tokenizer),
    )
    return (scores.argmax(1) == torch.tensor([names.index(r['label']) for r in test])).float().mean().item()


def tune_minilm(task, rows, labels, test, seed):
    "All weights of MiniLM-L6 and a linear head."
    import torch
    from torch.nn.functional import cross_entropy
    from ftbook.models.load import load_encoder, mean_pool

    torch.manual_seed(seed)
    names, t = labels_of(task), TRAINING['minilm']
    encoder, tokenizer = load_encoder('minilm-l6', device='cpu')
    top = torch.nn.Linear(encoder.config.hidden_size, len(names))

    def logits(rows):
        batch = tokenizer([r['text'] for r in rows], padding=True, truncation=True, return_tensors='pt')
        return top(mean_pool(encoder(**batch).last_hidden_state, batch['attention_mask']))

    optimizer = torch.optim.AdamW(
        [dict(params=encoder.parameters(), lr=t['lr']), dict(params=top.parameters(), lr=10 * t['lr'])],
        weight_decay=0.01,
    )
    y, rng = torch.tensor([names.index(l) for l in labels]), random.Random(seed)
    batches = []
    while len(batches) < epochs_for('minilm', len(rows)) * len(rows) / t['batch_size']:
        order = rng.sample(range(len(rows)), len(rows))
        batches += [order[i : i + t['batch_size']] for i in range(0, len(rows), t['batch_size'])]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * len(batches)), 1 - step / len(batches))
    )
    encoder.train()
    for batch in batches:
        cross_entropy(logits([rows[i] for i in batch]), y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    encoder.eval()
    with torch.no_grad():
        found = torch.cat([logits(test[i : i + 50]).argmax(1) for i in range(0, len(test), 50)])
    return (found == torch.tensor([names.index(r['label']) for r in test])).float().mean().item()


def tuned(how, task, seed, n, detail):
    "One fine-tuned model; detail is the level of the labels."
    train, test = split_task(task, seed)
    accuracy = dict(smollm2=tune_smollm2, minilm=tune_minilm)[how](
        task, train[:n], noisy(train[:n], detail, seed), test[:N_TESTED], seed
    )
    return {f'{detail} x {n}' if detail != 'all raters' else str(n): accuracy}
