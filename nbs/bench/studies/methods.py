"""Every method of the book on two tasks, each with a learning rate of its own.

A part is 'sweep' (one seed, judged by the loss on validation rows), 'run' (five seeds at the best rate of the sweep) or 'batch'
(larger batches). All train SmolLM2-135M on the same 96 rows, twice, 8 to a step. The answer is the most probable of the labels.
"""

import importlib, math, statistics, tempfile, time
from functools import cache

from instruments import fresh, half, interval, loaded, unrelated
from tasks import labels_of, split_task

KEY = 'part', 'variant', 'task', 'lr', 'seed', 'batch_size'
PACKAGES = 'torch', 'transformers', 'peft'
PER_PROCESS = 8
TASKS, N_TRAIN, N_VALID, N_TEST, BATCH, EPOCHS, SEEDS = ('movie', 'newsgroups'), 96, 64, 160, 8, 2, 5
FEWER_SEEDS = 3  # of the sizes in between
WORDS = 28  # of a message; a film snippet is about as long
SWEEP_SEED = 100  # its rows are drawn otherwise than those of the five seeds
TEXT = dict(
    movie='Read the film review and say whether its sentiment is negative or positive.',
    newsgroups='Read the message and name the newsgroup in which it was posted.',
)


# Variants: name -> (module of `ftbook.methods`, class, its arguments)


def lora(rank, **more):
    return 'lora_method', 'LoRA', dict(rank=rank, alpha=2 * rank, **more)


ATTENTION, MLP = ['q_proj', 'k_proj', 'v_proj', 'o_proj'], ['gate_proj', 'up_proj', 'down_proj']
RANKS = 1, 2, 4, 8, 16, 32, 64
VARIANTS = {
    'full': None,
    'LoRA 16': lora(16),
    'Houlsby 70': ('bottleneck_method', 'Bottleneck', dict(kind='houlsby', bottleneck_size=70)),
    'LoRA 1': lora(1),
    'Pfeiffer 141': ('bottleneck_method', 'Bottleneck', dict(kind='pfeiffer', bottleneck_size=141)),
    'parallel 141': ('bottleneck_method', 'Bottleneck', dict(kind='parallel', bottleneck_size=141)),
    'Houlsby 4': ('bottleneck_method', 'Bottleneck', dict(kind='houlsby', bottleneck_size=4)),
    '(IA)3': ('ia3', 'IA3', {}),
    'BitFit': ('bitfit', 'BitFit', {}),
    'prompt 32, text': ('prompt_tuning', 'PromptTuning', dict(num_virtual_tokens=32, init='text')),
    'prompt 32, random': ('prompt_tuning', 'PromptTuning', dict(num_virtual_tokens=32, init='random')),
    'prompt 32, vocabulary': ('prompt_tuning', 'PromptTuning', dict(num_virtual_tokens=32, init='vocabulary')),
    'prefix 26, text': ('prefix_tuning', 'PrefixTuning', dict(num_virtual_tokens=26, init='text')),
    'prefix 26, random': ('prefix_tuning', 'PrefixTuning', dict(num_virtual_tokens=26, init='random')),
    'LoRA 64': lora(64),
    'LoRA 4': lora(4),
    'LoRA 42, attention': lora(42, target_modules=ATTENTION),
    'LoRA 26, MLP': lora(26, target_modules=MLP),
    'DoRA 16': lora(16, use_dora=True),
    'PiSSA 16': lora(16, init='pissa_niter_4'),
    'LoRA+ 16': lora(16, lr_ratio=16),
    **{f'LoRA {r}': lora(r) for r in (8, 2, 32)},
    # in the order in which they are run
    'rsLoRA 64': ('lora_method', 'LoRA', dict(rank=64, alpha=16, use_rslora=True)),
    'OLoRA 16': lora(16, init='olora'),
}
IN_BETWEEN = 'LoRA 2', 'LoRA 4', 'LoRA 8', 'LoRA 32', 'Houlsby 4'
LADDER = 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1
# lowest of the three rates with which a sweep begins; 3e-4 for all others
FIRST = {
    'full': 3e-5,
    'IA3': 3e-3,
    'BitFit': 1e-3,
    'PromptTuning': 1e-2,
    'PrefixTuning': 3e-3,
    'LoRA+ 16': 1e-4,
    'PiSSA 16': 1e-4,
}
# of 'batch': full fine-tuning and LoRA 16, at the rates of the sweep and one above; the sweep itself has 8
BATCHES = 32, 64


def plan(runs):
    "Every run that is known by now, in order: the sweep of a variant, then its seeds."
    for job in dict.fromkeys(jobs(runs)):
        yield dict(zip(KEY, job))


def run(job):
    "What a method learnt and forgot; the probe beside them trains nothing."
    return probe(job['task'], job['seed']) if job['variant'] == 'probe' else one(**job)


def apply_(variant, model, tokenizer, task, seed):
    "Put the method on the model."
    if VARIANTS[variant] is None:
        return model
    module, name, given = VARIANTS[variant]
    more = dict(text=TEXT[task], tokenizer=tokenizer) if given.get('init') == 'text' else {}
    if name not in ('IA3', 'BitFit'):
        more['seed'] = seed
    return getattr(importlib.import_module(f'ftbook.methods.{module}'), name)(**given, **more).apply(model)


# Rows


@cache
def rows_of(task, seed):
    "(train, validation, test), each a list of (row of ftbook.data, label)."
    train, test = split_task(task, seed)

    def row(r):
        if task == 'movie':
            return dict(prompt=f"{r['text']}\nSentiment:", completion=f" {r['label']}")
        return dict(prompt=f"{' '.join(r['text'].split()[:WORDS])}\nNewsgroup:", completion=f" {r['label']}")

    parts = train[:N_TRAIN], train[N_TRAIN : N_TRAIN + N_VALID], test[:N_TEST]
    return tuple([(row(r), r['label']) for r in part] for part in parts)


def accuracy(model, tokenizer, task, rows):
    "Share of right answers."
    from ftbook.data.examples import prompt_ids
    from ftbook.forgetting.choices import choice_ids, choice_scores

    names = labels_of(task)
    chosen = choice_scores(
        model,
        [prompt_ids(r, tokenizer) for r, _ in rows],
        choice_ids(rows[0][0], [f' {name}' for name in names], tokenizer),
    ).argmax(1)
    return sum(names[i] == label for i, (_, label) in zip(chosen.tolist(), rows)) / len(rows)


# Runs


@cache
def before():
    "Loss of the untouched model on unrelated text."
    from ftbook.training.evaluate import evaluate

    model, tokenizer = loaded(half())
    return evaluate(model, unrelated(tokenizer)).loss


def spectra(model):
    "Kind of layer -> singular values of what its layers learned, the mean over the model's blocks."
    from ftbook.methods.lora import LoRALinear
    from ftbook.methods.switching import fewer_ranks

    found = {}
    for name, part in model.named_modules():
        if isinstance(part, LoRALinear):
            found.setdefault(name.rpartition('.')[2], []).append(
                part.scaling * fewer_ranks(part.lora_A.detach(), part.lora_B.detach(), 1)[2]
            )
    return {kind: [round(v, 5) for v in (sum(all_of) / len(all_of)).tolist()] for kind, all_of in found.items()}


def file_bytes(model):
    "Size of the adapter in files."
    from ftbook.methods.files import save_adapter

    with tempfile.TemporaryDirectory() as tmp:
        return sum(f.stat().st_size for f in save_adapter(model, tmp).iterdir())


def one(part, variant, task, lr, seed, batch_size):
    "Train once and judge."
    import torch
    from ftbook.data.encoding import encode
    from ftbook.training.evaluate import evaluate
    from ftbook.training.tune import finetune

    start = time.perf_counter()
    torch.manual_seed(seed)
    train, valid, test = rows_of(task, seed)
    model, tokenizer, precision = fresh(VARIANTS[variant] is None)
    apply_(variant, model, tokenizer, task, seed)
    begun = time.perf_counter()
    trained = finetune(
        model,
        encode([r for r, _ in train], tokenizer),
        lr=lr,
        batch_size=batch_size,
        epochs=EPOCHS,
        seed=seed,
        precision=precision,
        mixed=precision is not None,
        progress=False,
    )
    seconds = time.perf_counter() - begun
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # all are judged at the precision in which the model is used
    if VARIANTS[variant] is None:
        model.to(getattr(torch, half()))
    found = dict(
        valid_loss=evaluate(model, encode([r for r, _ in valid], tokenizer)).loss,
        train_loss=statistics.mean(h['loss'] for h in trained.history[-8:]),
        trained=n_trained,
    )
    if part == 'run':
        found |= tested(model, tokenizer, variant, task, seed, test)
    found = {k: round(v, 5) if isinstance(v, float) else v for k, v in found.items()}
    return found | dict(train_seconds=round(seconds, 1), seconds=round(time.perf_counter() - start, 1))


def tested(model, tokenizer, variant, task, seed, test):
    "Held-out rows and unrelated text; of the first seed, the size of the file and what the ranks are used for."
    from ftbook.training.evaluate import evaluate

    found = dict(
        accuracy=accuracy(model, tokenizer, task, test),
        forgetting=evaluate(model, unrelated(tokenizer)).loss - before(),
    )
    if VARIANTS[variant] is not None and seed == 0:
        found['file_bytes'] = file_bytes(model)
    if variant in {f'LoRA {r}' for r in RANKS} and seed == 0:
        found['spectra'] = spectra(model)
    return found


def probe(task, seed):
    "The frozen model's last hidden state at the end of the prompt, and a logistic regression on it."
    import numpy as np, torch
    from sklearn.linear_model import LogisticRegression
    from ftbook.data.examples import prompt_ids

    start = time.perf_counter()
    train, _, test = rows_of(task, seed)
    model, tokenizer = loaded(half())

    def states(rows):
        with torch.no_grad():
            return np.stack(
                [model.base_model(torch.tensor([prompt_ids(r, tokenizer)]))[0][0, -1].float().numpy() for r, _ in rows]
            )

    X, T = states(train), states(test)
    mean, std = X.mean(0), X.std(0) + 1e-6
    head = LogisticRegression(C=0.01, max_iter=2000).fit((X - mean) / std, [l for _, l in train])
    return dict(
        accuracy=round(float(head.score((T - mean) / std, [l for _, l in test])), 5),
        forgetting=0.0,
        trained=int(head.coef_.size + head.intercept_.size),
        seconds=round(time.perf_counter() - start, 1),
    )


# The plan


def begin(variant):
    "The three rates with which the sweep of a variant begins."
    kind = 'full' if VARIANTS[variant] is None else VARIANTS[variant][1]
    at = LADDER.index(FIRST.get(variant, FIRST.get(kind, 3e-4)))
    return LADDER[at : at + 3]


def swept(runs, variant, task):
    "Rate -> validation loss."
    return {r['lr']: r['valid_loss'] for r in runs if (r['part'], r['variant'], r['task']) == ('sweep', variant, task)}


def best_lr(runs, variant, task):
    "The rate that the seeds use, or None before the sweep is complete."
    return None if wanted(runs, variant, task) else chosen(swept(runs, variant, task))


def chosen(losses):
    """The smallest rate whose validation loss is within a tenth of the lowest: where a few rows cannot tell, the one
    that moves the model least."""
    finite = {lr: loss for lr, loss in losses.items() if math.isfinite(loss)} or losses
    return min(lr for lr, loss in finite.items() if not loss > 1.1 * min(finite.values()))


def wanted(runs, variant, task):
    "Rates that the sweep still needs: it begins with three and goes on while the chosen one is at an end."
    done = swept(runs, variant, task)
    if missing := [lr for lr in begin(variant) if lr not in done]:
        return missing
    at = LADDER.index(chosen(done))
    return [LADDER[k] for k in (at - 1, at + 1) if 0 <= k < len(LADDER) and LADDER[k] not in done]


def rates(runs, variant, task):
    "Rates of the whole sweep, those that are done first."
    return [*swept(runs, variant, task), *wanted(runs, variant, task)]


def jobs(runs):
    "The runs, as the values of KEY; some come twice."
    yield from (('run', 'probe', task, 0.0, seed, BATCH) for seed in range(SEEDS) for task in TASKS)
    yield from (
        ('batch', variant, 'movie', lr, SWEEP_SEED, size)
        for size in BATCHES
        for variant in ('full', 'LoRA 16')
        for lr in batch_rates(variant)
    )
    for n_seeds in (FEWER_SEEDS, SEEDS):
        for variant in VARIANTS:
            for task in TASKS:
                yield from (('sweep', variant, task, lr, SWEEP_SEED, BATCH) for lr in rates(runs, variant, task))
                if (lr := best_lr(runs, variant, task)) is not None:
                    yield from (
                        ('run', variant, task, lr, seed, BATCH)
                        for seed in range(FEWER_SEEDS if variant in IN_BETWEEN else n_seeds)
                    )


def batch_rates(variant):
    "A larger batch may want a larger rate: the first three and one above."
    at = LADDER.index(begin(variant)[0])
    return LADDER[at : at + 4]


# Summary

FAMILIES = {
    'full and LoRA': ('full', 'LoRA', 'LoRA+', 'rsLoRA', 'DoRA', 'PiSSA', 'OLoRA'),
    'adapters': ('Houlsby', 'Pfeiffer', 'parallel'),
    'vectors': ('(IA)3', 'BitFit'),
    'soft prompts': ('prompt', 'prefix'),
    'probe': ('probe',),
}


def family(variant):
    return next(f for f, names in FAMILIES.items() if variant.split()[0] in names)


def found(runs, variant, task, what='accuracy'):
    "One measure of the seeds at the chosen rate."
    lr = 0.0 if variant == 'probe' else best_lr(runs, variant, task)
    return [r[what] for r in runs if (r['part'], r['variant'], r['task'], r['lr']) == ('run', variant, task, lr)]


def measured(runs):
    "Variants with three seeds or more on every task."
    return [v for v in ('probe', *VARIANTS) if all(len(found(runs, v, task)) >= FEWER_SEEDS for task in TASKS)]


def cost_of(costs, variant, what):
    "Median over the rounds, or None."
    values = [r[what] for r in costs if r['variant'] == variant and r.get(what) is not None]
    return statistics.median(values) if values else None


def row_of(runs, costs, variant, task):
    "One row of the summary; an interval is (mean, half its width)."
    lr = best_lr(runs, variant, task) if variant != 'probe' else None
    size = [r['file_bytes'] for r in runs if r['variant'] == variant and 'file_bytes' in r]
    measures = {
        what: [round(v, 5) for v in interval(found(runs, variant, task, what))] for what in ('accuracy', 'forgetting')
    }
    price = {
        what: cost_of(costs, variant, what)
        for what in ('step_seconds', 'peak_bytes', 'forward_seconds', 'merged_seconds')
    }
    return dict(
        variant=variant,
        family=family(variant),
        task=task,
        trained=found(runs, variant, task, 'trained')[0],
        lr=lr,
        seeds=len(found(runs, variant, task)),
        **measures,
        valid_loss=swept(runs, variant, task).get(lr),
        file_bytes=size[0] if size else None,
        **price,
    )


def lowest(runs, variant, size):
    "The lowest validation loss on film reviews that any rate gave at a batch size; None before all have run."
    at = [
        r['valid_loss']
        for r in runs
        if (r['part'], r['batch_size'], r['variant'], r['task'])
        == ('sweep' if size == BATCH else 'batch', size, variant, 'movie')
    ]
    return min(at) if len(at) >= (3 if size == BATCH else len(batch_rates(variant))) else None


def summarize(results):
    "What the lessons read: means and intervals of the runs at the chosen rates, and what each method costs."
    from harness import Study

    runs, costs = results['runs'], Study('methods_cost').read()['runs']
    spectra = [
        dict(rank=int(r['variant'].split()[1]), task=r['task'], **r['spectra'])
        for r in runs
        if 'spectra' in r and r['lr'] == best_lr(runs, r['variant'], r['task'])
    ]
    lows = {size: {v: lowest(runs, v, size) for v in ('full', 'LoRA 16')} for size in (BATCH, *BATCHES)}
    return dict(
        machines=results['machines'],
        rates={
            v: {task: swept(runs, v, task) for task in TASKS}
            for v in VARIANTS
            if all(best_lr(runs, v, task) for task in TASKS)
        },
        batches={size: {v: loss for v, loss in low.items() if loss is not None} for size, low in lows.items()},
        spectra=sorted(spectra, key=lambda r: r['rank']),
        rows=[row_of(runs, costs, v, task) for v in measured(runs) for task in TASKS],
    )
