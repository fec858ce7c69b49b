"""Forgetting: one task after another, and what is left of the earlier ones and of other text.

All train SmolLM2-135M on 64 short rows a task, twice, 8 to a step, with the same weights (or the same adapter) going on from task to
task. Before the first task and after each, it is asked about held-out rows of all tasks (the most probable of a task's labels; of
explanations, the loss), and reads two kinds of other text. The last model of some runs is also judged on the line back to the
base. Neutral text, for the remedies that need some, is of the same kinds but never the text that is judged. The first seed tries
every strength of a remedy; the other seeds run the better one (by learnt minus lost).
"""

import copy, random, statistics, time
from functools import cache

from instruments import fresh, half, interval, loaded
from tasks import asked, form_labels, form_rows

KEY = 'sequence', 'variant', 'seed'
PACKAGES = 'torch', 'transformers'
PER_PROCESS = 6
SEQUENCES = dict(domains=('movie', 'products', 'tweets', 'news'), explaining=('movie', 'jargon'))
N_TRAIN, N_TEST, WORDS, BATCH, EPOCHS, SEEDS = 64, 48, 16, 8, 2, 3
OTHER, NEUTRAL = dict(newspaper=16, foldoc=16), 16  # texts of each kind to judge by, and to train with
LINE = 0.0, 0.2, 0.4, 0.6, 0.8

RATES = dict(full=(1e-5, 3e-5, 1e-4, 3e-4), lora=(1e-4, 3e-4, 1e-3, 3e-3))
STEEP = dict(full=1e-4, lora=1e-3)  # rates at which there is something to be lost


def way(method, remedy='none', strength=0.0, lr=None, **more):
    return dict(method=method, remedy=remedy, strength=strength, lr=lr or STEEP[method], **more)


VARIANTS = {f'{m} {lr:g}': way(m, lr=lr) for m, rates in RATES.items() for lr in rates}
VARIANTS |= {
    f'{m}, {r} {s:g}': way(m, r, s)
    for m in RATES
    for r, s in (
        ('replay', 0.2),
        ('distill', 1.0),
        ('replay', 0.5),
        ('distill', 10.0),
        ('average', 0.5),
        ('half the steps', 0.5),
    )
}
VARIANTS |= {
    f'full, {r} {s:g}': way('full', r, s)
    for r, s in (('L2-SP', 1.0), ('L2-SP', 10.0), ('EWC', 1e3), ('EWC', 1e5), ('freeze', 15))
}
VARIANTS |= {f'lora, rank {r}': way('lora', rank=r) for r in (2, 64)}
RANK = 16
FEW = tuple(f'{m} {lr:g}' for m, rates in RATES.items() for lr in rates[1:])  # variants of the short sequence
LINED = 'full 0.0001', 'full 0.0003', 'lora 0.001', 'lora 0.003'


def plan(runs):
    "All variants with the first seed, those that are chosen then with the others."
    for seed in range(SEEDS):
        for sequence, some in (('domains', chosen(runs) if seed else VARIANTS), ('explaining', FEW)):
            for variant in some:
                yield dict(sequence=sequence, variant=variant, seed=seed)


def run(job):
    "What the model knows before the first task and after each, and on the line back to the base."
    from ftbook.forgetting.remedies import Interpolation, trained_weights
    from ftbook.forgetting.holding_back import freeze_layers_

    sequence, variant, seed = (job[k] for k in KEY)
    start, way = time.process_time(), VARIANTS[variant]
    first = judged_base(way['method'] == 'full', sequence, seed)
    model, precision = begun_with(way, seed)
    if way['remedy'] == 'freeze':
        freeze_layers_(model, way['strength'])
    before = trained_weights(model) if variant in LINED and way['method'] == 'full' else None
    stages, past, trained, steps = [first], [], 0.0, []
    stiffness = stiffer(None, model, other_text()[1]) if way['remedy'] == 'EWC' else None
    for task in SEQUENCES[sequence]:
        begun = time.process_time()
        steps.append(learn(way, model, task, seed, past, stiffness, precision))
        trained += time.process_time() - begun
        stages.append(judged(model, sequence, seed, precision))
        past = past + list(examples(rows_of(task, seed)[0][:NEUTRAL]))
        if way['remedy'] == 'EWC':
            stiffness = stiffer(stiffness, model, past[-NEUTRAL:])
    found = dict(stages=stages, steps=steps, train_cpu_seconds=round(trained, 1))
    if variant in LINED:
        line = Interpolation(model, before)
        found['line'] = [dict(x=x, **judged(line.put_(x), sequence, seed, precision)) for x in LINE]
    return dict(**way, **found, cpu_seconds=round(time.process_time() - start, 1))


# Rows


@cache
def rows_of(task, seed):
    "(train, test): rows of ftbook.data, with their label where they have one."
    if task == 'jargon':
        from ftbook.data.corpora import load_corpus

        rows = [r for r in load_corpus('jargon') if 60 < len(r['definition']) < 240]
        rows = [
            dict(prompt=f"What does {r['term']} mean?\n", completion=' '.join(r['definition'].split()[:WORDS]))
            for r in random.Random(f'jargon {seed}').sample(rows, N_TRAIN + N_TEST)
        ]
        return rows[:N_TRAIN], rows[N_TRAIN:]
    train, test = form_rows(task, seed)
    return train[:N_TRAIN], test[:N_TEST]


def examples(rows):
    "The rows, encoded."
    from ftbook.data.encoding import encode

    return encode(asked(rows), loaded(half())[1])


@cache
def other_text():
    "({kind: examples to judge by}, neutral examples)."
    from ftbook.forgetting.lost import forgetting_texts, plain_example

    tokenizer, judged, neutral = loaded(half())[1], {}, []
    for kind, n in OTHER.items():
        found = [plain_example(t, tokenizer, 48) for t in forgetting_texts(kind, n + NEUTRAL // len(OTHER), seed=0)]
        judged[kind], neutral = found[:n], neutral + found[n:]
    return judged, neutral


# Judging


def score(model, task, seed):
    "(share right or None, loss): among the labels, or per token of the explanations."
    import torch
    from ftbook.data.examples import prompt_ids
    from ftbook.forgetting.choices import choice_ids, choice_scores
    from ftbook.training.evaluate import evaluate

    test = rows_of(task, seed)[1]
    if task == 'jargon':
        return None, round(evaluate(model, examples(test)).loss, 5)
    tokenizer, names = loaded(half())[1], form_labels(task)
    found = choice_scores(
        model,
        [prompt_ids(r, tokenizer) for r in test],
        choice_ids(asked(test[:1])[0], [f' {n}' for n in names], tokenizer),
    )
    right = torch.tensor([names.index(r['label']) for r in test])
    return round((found.argmax(1) == right).float().mean().item(), 5), round(
        torch.nn.functional.cross_entropy(found, right).item(), 5
    )


def judged(model, sequence, seed, precision):
    "What a model knows now. All are judged at the precision in which the model is used."
    import torch
    from ftbook.training.evaluate import evaluate

    ready = copy.deepcopy(model).to(getattr(torch, half())) if precision else model
    found = {t: score(ready, t, seed) for t in SEQUENCES[sequence]}
    return dict(
        accuracy={t: a for t, (a, _) in found.items()},
        loss={t: l for t, (_, l) in found.items()},
        other={k: round(evaluate(ready, texts).loss, 5) for k, texts in other_text()[0].items()},
    )


@cache
def judged_base(full, sequence, seed):
    "What the base knows: the same for every variant of a method."
    model, _, precision = fresh(full)
    return judged(model, sequence, seed, precision)


# Training


def remedied(way, model, past, stiffness):
    "(regularizer, callbacks, what else is trained on) of a task."
    from ftbook.forgetting.holding_back import AverageWeights
    from ftbook.forgetting.remedies import Distill, Spring

    name, strength, old = way['remedy'], way['strength'], past or other_text()[1]
    if name == 'L2-SP':
        return Spring(model, strength), [], []
    if name == 'EWC':
        return Spring(model, strength, stiffness), [], []
    if name == 'distill':
        return Distill(model, other_text()[1] + past, strength), [], []
    if name == 'average':
        return None, [AverageWeights(strength)], []
    return None, [], old if name == 'replay' else []


def learn(way, model, task, seed, past, stiffness, precision):
    "Train on a task, with the remedy."
    from ftbook.forgetting.remedies import replay
    from ftbook.training.tune import finetune

    regularizer, callbacks, old = remedied(way, model, past, stiffness)
    new = list(examples(rows_of(task, seed)[0]))
    data = replay(new, old, way['strength'], seed) if old else new
    epochs = EPOCHS * (way['strength'] if way['remedy'] == 'half the steps' else 1)
    trained = finetune(
        model,
        data,
        lr=way['lr'],
        batch_size=BATCH,
        epochs=epochs,
        seed=seed,
        precision=precision,
        mixed=precision is not None,
        regularizer=regularizer,
        callbacks=callbacks,
        progress=False,
    )
    for average in callbacks:
        average.put_(model)
    return len(trained.history)


def stiffer(stiffness, model, texts):
    "The Fisher information of what was learnt last, added to that of before."
    from ftbook.forgetting.remedies import fisher

    found = fisher(model, texts)
    return found if stiffness is None else {n: t + found[n] for n, t in stiffness.items()}


def begun_with(way, seed):
    "(model, precision): the base, ready to be trained."
    import torch
    from ftbook.methods.lora_method import LoRA

    torch.manual_seed(seed)
    model, _, precision = fresh(way['method'] == 'full')
    if way['method'] == 'lora':
        rank = way.get('rank', RANK)
        LoRA(rank=rank, alpha=2 * rank, seed=seed).apply(model)
    return model, precision


# The plan


def chosen(runs):
    """Variants of the long sequence that are run with all seeds: of a remedy with several strengths, the better one;
    empty until the first seed is complete."""
    first = {r['variant']: learnt(r) - lost(r) for r in runs if (r['sequence'], r['seed']) == ('domains', 0)}
    if len(first) < len(VARIANTS):
        return []
    rivals = {}
    for v, w in VARIANTS.items():
        if w['remedy'] != 'none':
            rivals.setdefault((w['method'], w['remedy']), []).append(v)
    beaten = {v for some in rivals.values() for v in some if v != max(some, key=first.get)}
    return [v for v in VARIANTS if v not in beaten]


# What a run says

UNITS = dict(domains='right answers, share', explaining='nats per token of the explanations')


def task_loss(stage, sequence):
    return [stage['loss'][t] for t in SEQUENCES[sequence]]


def other_loss(stage):
    return statistics.mean(stage['other'].values())


def scores(run):
    """The table that `ftbook.forgetting.sequences.transfer` reads, a row for each stage: accuracy, or minus the loss where there
    is no accuracy."""
    return [
        [
            stage['loss'][t] * -1 if stage['accuracy'][t] is None else stage['accuracy'][t]
            for t in SEQUENCES[run['sequence']]
        ]
        for stage in run['stages']
    ]


# tasks in the unit of the sequence
def counted(run):
    return [i for i, t in enumerate(SEQUENCES[run['sequence']]) if (t == 'jargon') == (run['sequence'] == 'explaining')]


def learnt(run):
    """How much better each task was right after its own training than before the sequence, the mean over the tasks, in
    `UNITS`."""
    table = scores(run)
    return statistics.mean(table[i + 1][i] - table[0][i] for i in counted(run))


def kept(run):
    "The same at the end of the sequence."
    table = scores(run)
    return statistics.mean(table[-1][i] - table[0][i] for i in counted(run))


def fell(run):
    """Nats by which the loss on each task was lower right after its own training than before the sequence, the mean
    over all tasks."""
    losses = [task_loss(stage, run['sequence']) for stage in run['stages']]
    return statistics.mean(losses[0][i] - losses[i + 1][i] for i in range(len(losses[0])))


def lost(run):
    "Nats per token by which other text got worse, the mean over its kinds."
    return other_loss(run['stages'][-1]) - other_loss(run['stages'][0])


def line_of(run):
    "Points of the line from the base to the last model: x, task (mean loss of the tasks) and other."
    ends = [dict(x=1.0, **run['stages'][-1])] if 'line' in run else []
    return [
        dict(x=p['x'], task=statistics.mean(task_loss(p, run['sequence'])), other=other_loss(p))
        for p in [*run.get('line', []), *ends]
    ]


def of(runs, sequence, variant):
    return sorted((r for r in runs if (r['sequence'], r['variant']) == (sequence, variant)), key=lambda r: r['seed'])


def measured(runs, sequence, n=SEEDS):
    "Variants of a sequence with so many seeds."
    return [v for v in VARIANTS if len(of(runs, sequence, v)) >= n]


# Methods at equal learning

# so many right answers, as a share, are not told apart; a standard error is about .03
SLACKS, SLACK = (0.0, 0.01, 0.02, 0.03, 0.04), 0.02


def by_rate(runs, sequence, method, seed):
    "The curve of the rates with one seed, from the base on: (learnt, lost)."
    return [
        (0.0, 0.0),
        *(
            (learnt(r), lost(r))
            for lr in RATES[method]
            for r in of(runs, sequence, f'{method} {lr:g}')
            if r['seed'] == seed
        ),
    ]


def price(curve, level):
    """The least that is lost where at least so much is learnt, on the straight lines between neighbours; None where
    nothing learns as much."""
    paid = [c for a, c in curve if a >= level]
    paid += [
        c + (d - c) * (level - a) / (b - a) for (a, c), (b, d) in zip(curve, curve[1:]) if min(a, b) < level < max(a, b)
    ]
    return min(paid, default=None)


def reach(curve):
    return max(a for a, _ in curve)


def at_equal_learning(runs, sequence, share):
    """Per seed, what full fine-tuning and LoRA lose where both have learnt the same: a share of the most that the less
    able of the two learns."""
    found = []
    for seed in sorted({r['seed'] for r in runs if r['sequence'] == sequence}):
        curves = {m: by_rate(runs, sequence, m, seed) for m in RATES}
        level = share * min(map(reach, curves.values()))
        found.append(dict(seed=seed, learnt=level) | {m: price(c, level) for m, c in curves.items()})
    return found


def spared(runs, run, slack=SLACK):
    """What a remedy lost less than its method alone would have with the same rows, at a rate that learns as much to
    `slack`, or the most where none learns as much."""
    curve = by_rate(runs, run['sequence'], run['method'], run['seed'])
    return price(curve, min(learnt(run), reach(curve)) - slack) - lost(run)


# The summary


def row_of(runs, sequence, v):
    "One row: an interval is (mean, half its width)."
    from ftbook.forgetting.sequences import transfer

    here = of(runs, sequence, v)
    moved, gains = [transfer(scores(r)) for r in here], {}
    # right answers and nats have no average
    values = {f.__name__: map(f, here) for f in (learnt, kept, fell, lost)} | {
        k: [m[k] for m in moved] for k in ('average', 'backward', 'forward')[sequence == 'explaining' :]
    }
    if VARIANTS[v]['remedy'] != 'none' or 'rank' in VARIANTS[v]:
        values['spared'] = [spared(runs, r) for r in here]
        gains = dict(spared_at={f'{s:g}': [round(spared(runs, r, s), 5) for r in here] for s in SLACKS})
    return dict(
        sequence=sequence,
        variant=v,
        **VARIANTS[v],
        seeds=len(here),
        **gains,
        **{k: [round(x, 5) for x in interval(list(o))] for k, o in values.items()},
        cpu_seconds=statistics.median(r['train_cpu_seconds'] for r in here),
    )


def mean_line(runs, sequence, v):
    "The line from the base to the last model, the mean over the seeds: x, task and other."
    lines = [line_of(r) for r in of(runs, sequence, v)]
    return [
        dict(x=points[0]['x'], **{k: round(statistics.mean(p[k] for p in points), 5) for k in ('task', 'other')})
        for points in zip(*lines)
    ]


SHARES = 0.25, 0.5, 0.75, 0.9


def summarize(results):
    "What the lessons read: intervals over the seeds, full fine-tuning and LoRA at equal learning, lines, moves."
    from harness import Study

    runs = results['runs']
    equal = [
        dict(sequence=s, share=share, seeds=seeds, apart=interval([o['lora'] - o['full'] for o in seeds]))
        for s in SEQUENCES
        for share in SHARES
        for seeds in [at_equal_learning(runs, s, share)]
    ]
    return dict(
        machines=results['machines'],
        units=UNITS,
        moves=Study('forgetting_moves').read()['runs'],
        rows=[row_of(runs, s, v) for s in SEQUENCES for v in measured(runs, s)],
        equal=equal,
        lines={s: {v: mean_line(runs, s, v) for v in measured(runs, s) if v in LINED} for s in SEQUENCES},
    )
