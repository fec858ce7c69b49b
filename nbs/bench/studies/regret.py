"""LoRA without regret? Full fine-tuning against LoRA of every rank, on every layer, attention alone or the MLP alone, each over its own rates.

The rule, written down before the runs:

1. Every variant trains once over the same 1,024 rows of a task, 16 to a step, at a constant rate without warm-up, alpha 32 at every
   rank, so that the factor is 32 / rank, as in Schulman et al. (2025). A seed draws the training rows, their order and the adapter.
2. The sweep (seed 0) takes six rates, half a decade apart. While the best is at an end of them, the next rate beyond that end is
   run, too. Best is the lowest loss on validation rows; a run whose loss is not finite counts as worst.
3. The best rate of seed 0 and its two neighbours are run with seeds 1 to 4. The rate of a variant is the one of the three with the
   lowest mean validation loss over the five seeds. The interval of its best rate comes from a parabola in log10(rate) through the
   three means, drawn anew over seeds; where the three do not bend upwards, the interval is the whole of the three.
4. Test loss at that rate is what is reported. Two variants are compared seed by seed, with Student's interval of the difference. A
   difference whose interval holds 0 is 'not told apart'.
5. Batches of 1, 4 and 64 rows: full, rank 1, 16 and 256 at five rates, the best rate of 16 rows and half a decade and a decade to
   both sides, seeds 0 to 2. The rate is chosen as in 3, among the five.

`variant` is 'full', 'LoRA 1' to 'LoRA 256' (every linear layer but the head), 'LoRA 42, attention' or 'LoRA 26, MLP'; the last two
train as many numbers as 'LoRA 16'.
"""

import copy, math, random, time
from collections import defaultdict
from functools import cache
from statistics import mean

from instruments import half, loaded
from tasks import split_task

KEY = 'model', 'task', 'variant', 'lr', 'batch_size', 'seed'
PACKAGES = 'torch', 'transformers'
PER_PROCESS = 6
MODELS = ('smollm2-135m',)
TASKS = 'newsgroups', 'foldoc'
N_TRAIN, N_VALID, N_TEST, WORDS, BATCH = 1024, 256, 256, 16, 16
ALPHA, SEEDS = 32, 5
RANKS = 1, 4, 16, 64, 256
ATTENTION, MLP = ['q_proj', 'k_proj', 'v_proj', 'o_proj'], ['gate_proj', 'up_proj', 'down_proj']
VARIANTS = {  # name -> (rank, layers), or None for full fine-tuning
    'full': None,
    'LoRA 16': (16, 'all-linear'),
    'LoRA 1': (1, 'all-linear'),
    'LoRA 256': (256, 'all-linear'),
    'LoRA 42, attention': (42, ATTENTION),
    'LoRA 26, MLP': (26, MLP),
    'LoRA 4': (4, 'all-linear'),
    'LoRA 64': (64, 'all-linear'),
}
LADDER = tuple(float(f'{digit}e{power}') for power in range(-7, 1) for digit in (1, 3))  # half a decade apart, nearly
SWEPT = 6  # rates of a sweep
FIRST = dict(full=1e-5)  # its lowest rate; 1e-4 for LoRA
BATCHES, BATCH_VARIANTS, BATCH_SEEDS = (1, 4, 64), ('full', 'LoRA 1', 'LoRA 16', 'LoRA 256'), 3


# What is to be run


def losses(runs, model, task, variant, batch_size=BATCH):
    "rate -> {seed: validation loss}; what is not finite is infinite."
    found = defaultdict(dict)
    for r in runs:
        if (r['model'], r['task'], r['variant'], r['batch_size']) == (model, task, variant, batch_size):
            found[r['lr']][r['seed']] = r['valid_loss'] if math.isfinite(r['valid_loss']) else math.inf
    return found


def first_rates(variant):
    "The rates with which a sweep begins."
    at = LADDER.index(FIRST.get(variant, 1e-4))
    return LADDER[at : at + SWEPT]


def swept(found):
    "rate -> loss of seed 0."
    return {lr: seeds[0] for lr, seeds in found.items() if 0 in seeds}


def sweep(found, variant):
    "The rates that the sweep still wants: the first six, then beyond an end that is the best."
    done = swept(found)
    if wanted := [lr for lr in first_rates(variant) if lr not in done]:
        return wanted
    at = LADDER.index(min(done, key=done.get))
    return [LADDER[k] for k in (at - 1, at + 1) if 0 <= k < len(LADDER) and LADDER[k] not in done]


def three_rates(found):
    "The best rate of seed 0 and its neighbours."
    done = swept(found)
    at = LADDER.index(min(done, key=done.get))
    return LADDER[max(0, at - 1) : at + 2]


def best_rate(found, rates, seeds):
    "The rate with the lowest mean validation loss, or None while runs are missing."
    if any(len([s for s in seeds if s in found[lr]]) < len(seeds) for lr in rates):
        return None
    return min(rates, key=lambda lr: mean(found[lr][s] for s in seeds))


def plan(runs):
    "Sweeps of all variants, then the seeds, then the batches; one task after the other."
    for model in MODELS:
        for task in TASKS:
            yield from plan_task(runs, model, task)


def plan_task(runs, model, task):
    "The runs of one model on one task."

    def job(variant, lr, seed, batch_size=BATCH):
        return dict(model=model, task=task, variant=variant, lr=lr, batch_size=batch_size, seed=seed)

    found = {variant: losses(runs, model, task, variant) for variant in VARIANTS}
    unfinished = {variant: sweep(found[variant], variant) for variant in VARIANTS}
    for variant, rates in unfinished.items():
        yield from (job(variant, lr, 0) for lr in swept(found[variant]))
        yield from (job(variant, lr, 0) for lr in rates)
    for seed in range(1, SEEDS):
        for variant in VARIANTS:
            if not unfinished[variant]:
                yield from (job(variant, lr, seed) for lr in three_rates(found[variant]))
    for variant in BATCH_VARIANTS:
        if unfinished[variant]:
            continue
        best = best_rate(found[variant], three_rates(found[variant]), range(SEEDS))
        if best is not None:
            at = LADDER.index(best)
            for size in BATCHES:
                for seed in range(BATCH_SEEDS):
                    yield from (job(variant, lr, seed, size) for lr in LADDER[max(0, at - 2) : at + 3])


# One run


@cache
def rows_of(task, seed):
    "(train, validation, test): rows of prompt and completion. The last two are the same for every seed of foldoc."
    if task == 'newsgroups':
        train, test = split_task(task, seed)
        made = [
            dict(prompt=f"{' '.join(r['text'].split()[:WORDS])}\nNewsgroup:", completion=f" {r['label']}")
            for r in train[:N_TRAIN] + test[: N_VALID + N_TEST]
        ]
    else:
        rows = entries()
        held = random.Random(1).sample(rows, N_VALID + N_TEST)
        away = {r['prompt'] for r in held}
        made = random.Random(seed + 100).sample([r for r in rows if r['prompt'] not in away], N_TRAIN) + held
    return made[:N_TRAIN], made[N_TRAIN : N_TRAIN + N_VALID], made[N_TRAIN + N_VALID :]


@cache
def entries():
    "The dictionary of computing: a term, and the beginning of what it means."
    from ftbook.data.corpora import load_corpus

    texts = {r['term']: ' '.join(r['definition'].split()[:WORDS]) for r in load_corpus('foldoc')}
    return [
        dict(prompt=f'{term}:', completion=f' {text}') for term, text in texts.items() if len(text.split()) == WORDS
    ]


def prepared(job):
    "(model, tokenizer, precision) with the method on the model. Full fine-tuning trains weights in float32."
    from ftbook.methods.lora_method import LoRA

    chosen = VARIANTS[job['variant']]
    model, tokenizer = loaded('float32' if chosen is None else half(), job['model'])
    model = copy.deepcopy(model)
    if chosen is not None:
        rank, layers = chosen
        model = LoRA(rank=rank, alpha=ALPHA, target_modules=layers, seed=job['seed']).apply(model)
    mixed = chosen is None and half() == 'bfloat16'
    return model, tokenizer, 'bfloat16' if mixed else None


def run(job):
    "Losses on validation and test rows, in nats per token that is taught."
    import torch
    from ftbook.data.encoding import encode
    from ftbook.training.evaluate import evaluate
    from ftbook.training.checks import NonFiniteLoss
    from ftbook.training.tune import finetune

    start = time.perf_counter()
    torch.manual_seed(job['seed'])
    model, tokenizer, precision = prepared(job)
    train, valid, test = (encode(rows, tokenizer) for rows in rows_of(job['task'], job['seed']))
    given = dict(lr=job['lr'], batch_size=job['batch_size'], seed=job['seed'], schedule='constant', warmup=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    try:
        history = finetune(
            model, train, **given, precision=precision, mixed=precision is not None, progress=False
        ).history
    except NonFiniteLoss:
        return dict(valid_loss=math.inf, test_loss=math.inf, trained=trained, seconds=time.perf_counter() - start)
    if precision:
        model.to(getattr(torch, half()))  # all are judged at the precision in which the model is used
    steps = [h['loss'] for h in history]
    return dict(
        valid_loss=round(evaluate(model, valid).loss, 5),
        test_loss=round(evaluate(model, test).loss, 5),
        train_losses=[round(mean(steps[i : i + 8]), 4) for i in range(0, min(len(steps), 64), 8)],
        trained=trained,
        steps=len(steps),
        tokens=sum(len(e.ids) for e in train),
        seconds=round(time.perf_counter() - start, 1),
    )
