"""Train on one domain, test on all four: does distance predict transfer?

`how` is 'frozen' (MiniLM-L6 as it is, logistic regression on top) or 'smollm2' (SmolLM2-135M, LoRA on all linear layers).
"""

import time

import numpy as np

from tasks import DOMAINS, LABELS, labelled, split_domain

KEY = 'how', 'train', 'seed'
PACKAGES = 'torch', 'transformers', 'scikit-learn', 'numpy'
PER_PROCESS = 4
SEEDS = dict(frozen=10, smollm2=3)  # runs of each training domain
SIZES = dict(frozen=(600, 360), smollm2=(400, 200))  # rows to train and to test on, half of each label
TRAINING = dict(rank=16, alpha=32, lr=1e-3, batch_size=16, epochs=2)
INSTRUCTION = 'Is the sentiment {labels}?'


def plan(runs):
    "The cheap runs first, then seed by seed."
    for how, seeds in SEEDS.items():
        for seed in range(seeds):
            for domain in DOMAINS:
                yield dict(how=how, train=domain, seed=seed)


def run(job):
    "Accuracy and loss in bits on every domain."
    start = time.perf_counter()
    way = dict(frozen=frozen, smollm2=smollm2)[job['how']]
    found = way(job['train'], job['seed'])
    rows, test_rows = SIZES[job['how']]
    return dict(
        tests={name: {k: round(v, 4) for k, v in f.items()} for name, f in found.items()},
        rows=rows,
        test_rows=test_rows,
        seconds=round(time.perf_counter() - start, 1),
    )


# The two ways


embedded = {}  # domain -> {id of a row: its vector}


def frozen(domain, seed):
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

    X, y = arrays(split_domain(domain, seed, *SIZES['frozen'])[0], domain)
    head = LogisticRegression(C=3.0, max_iter=2000).fit(X, y)
    found = {}
    for name in DOMAINS:
        X, y = arrays(split_domain(name, seed, *SIZES['frozen'])[1], name)
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
    train = split_domain(domain, seed, *SIZES['smollm2'])[0]
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
        test = split_domain(name, seed, *SIZES['smollm2'])[1]
        prompts, y = (
            [prompt_ids(row(r), tokenizer) for r in test],
            torch.tensor([LABELS.index(r['label']) for r in test]),
        )
        scores = choice_scores(model, prompts, choice_ids(row(test[0]), LABELS, tokenizer))
        bits = torch.nn.functional.cross_entropy(scores.log_softmax(1), y).item() / np.log(2)
        found[name] = dict(accuracy=(scores.argmax(1) == y).float().mean().item(), bits=float(bits))
    return found
