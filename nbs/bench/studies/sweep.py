"""A sweep of hyperparameters on two tasks, and a random search of the same space on three others.

A part is 'base' (the untouched model), 'design' (a quasi-random design of the space on `TASKS`), 'best' (the best of each method
again, with other seeds and other rows), 'search' (a random search of the same space on `HELD_OUT`) or 'recommended' (what
`ftbook.choose.recommend` says there, knowing only 'design' and 'best', and how the untouched model does). All train SmolLM2-135M
on 64 rows with one thread; the answer is the most probable of the labels. `cpu_seconds` is the processor time of the training
alone, `peak_bytes` the memory above the loaded weights.

`summary` writes what ships in ftbook/assets: sweep.parquet, all runs without their losses, and evidence.json, a summary of other
studies.
"""

import copy, json, math, random, statistics, time
from functools import cache

from ftbook.choose.sweep import SETTINGS
from ftbook.results import read_results
from harness import HERE, RESULTS, Study
from instruments import Memory, loaded, unrelated
from tasks import FORMS, asked, form_labels, form_rows

KEY = 'part', 'task', 'seed', 'number'
PACKAGES = 'torch', 'transformers', 'scipy', 'ftbook'
PER_PROCESS, THREADS = 8, 1
ASSETS = HERE.parent.parent / 'ftbook' / 'assets'
TASKS, HELD_OUT = ('movie', 'newsgroups'), ('r8', 'tweets', 'products')
N_TRAIN, N_VALID, N_TEST, N_UNRELATED = 64, 48, 144, 12
SEED, SEEDS, SEARCHED = 0, (1, 2, 3), 50  # of the design and the search; of the best again; runs of the search
# points of the design that are run on each task, of 104; all methods have their share of them
DESIGNED = 64


# The space: method -> (points of the design, share of the search, middle of the learning rates, values of each setting)

MODULES = {
    'attention': ['q_proj', 'k_proj', 'v_proj', 'o_proj'],
    'mlp': ['gate_proj', 'up_proj', 'down_proj'],
    'all-linear': 'all-linear',
}
COMMON = dict(
    batch_size=(4, 8, 16, 32),
    epochs=(1, 2, 4),
    warmup=(0.0, 0.03, 0.1, 0.3),
    precision=('bfloat16', 'bfloat16', 'bfloat16', 'float32'),
)
SPACE = {
    'lora': (
        64,
        0.6,
        3e-4,
        dict(
            rank=(1, 2, 4, 8, 16, 32, 64),
            alpha_ratio=(0.5, 1.0, 2.0, 4.0),
            target_modules=tuple(MODULES),
            dropout=(0.0, 0.05, 0.1, 0.2),
            **COMMON,
        ),
    ),
    'full': (16, 0.15, 3e-5, COMMON),
    'houlsby': (16, 0.15, 3e-4, dict(rank=(4, 8, 16, 32, 64, 128), dropout=(0.0, 0.05, 0.1, 0.2), **COMMON)),
    # rank: width of the bottleneck, or virtual tokens
    'prompt': (8, 0.1, 3e-2, dict(rank=(4, 8, 16, 32), **COMMON)),
}
DECADES = 1.5  # that the learning rate may lie below or above the middle
BEST = dict(lora=3, full=2, houlsby=1, prompt=1)  # configurations of each method that are run again


def at(method, point):
    "The configuration at a point of the unit cube."
    _, _, middle, settings = SPACE[method]
    lr = float(f'{middle * 10 ** (DECADES * (2 * point[0] - 1)):.2g}')
    return (
        dict.fromkeys(SETTINGS)
        | dict(method=method, lr=lr)
        | {
            name: values[min(int(u * len(values)), len(values) - 1)]
            for (name, values), u in zip(settings.items(), point[1:])
        }
    )


@cache
def design():
    "Sobol points of every method's space."
    from scipy.stats import qmc

    found = []
    for method, (n, _, _, settings) in SPACE.items():
        points = qmc.Sobol(1 + len(settings), seed=SEED).random_base2(n.bit_length() - 1)
        found += [at(method, p) for p in points.tolist()]
    # all methods from the beginning
    return sorted(found, key=lambda c: (found.index(c) % 16, found.index(c)))[:DESIGNED]


@cache
def searched(task):
    "Points of a random search, the method drawn by its share."
    rng = random.Random(f'search {task}')

    def draw():
        method = rng.choices(list(SPACE), [share for _, share, _, _ in SPACE.values()])[0]
        return at(method, [rng.random() for _ in range(1 + len(SPACE[method][3]))])

    return [draw() for _ in range(SEARCHED)]


PARTS = {'base': (*TASKS, *HELD_OUT), 'design': TASKS, 'best': TASKS, 'search': HELD_OUT, 'recommended': HELD_OUT}
ABOUT = dict(
    rows=dict(train=N_TRAIN, valid=N_VALID, test=N_TEST),
    planned=dict(design=dict.fromkeys(TASKS, DESIGNED), search=dict.fromkeys(HELD_OUT, SEARCHED)),
    model='smollm2-135m',
)


def plan(runs):
    "Part by part. A run that is recommended may turn into two, LoRA and SetFit, numbered from 0."
    for part, tasks in PARTS.items():
        for seed, number, task in numbers(part, runs):
            yield dict(part=part, task=task, seed=seed, number=number)


def run(job):
    "What a configuration gave and what it cost."
    import torch

    torch.set_num_threads(1)
    before()
    part, task, seed, number = (job[k] for k in KEY)
    if part == 'recommended':
        return [dict(number=i) | one(part, task, seed, c) for i, c in enumerate(recommended(task, seed))]
    config = dict(method='none') if part == 'base' else searched(task)[number] if part == 'search' else design()[number]
    return one(part, task, seed, config)


# Rows


@cache
def rows_of(task, seed):
    "(train, validation, test), each a list of (row of ftbook.data, label); all labels in turn."
    train, test = ([*zip(asked(rows), (r['label'] for r in rows))] for rows in form_rows(task, seed))
    valid = (test[N_TEST:] + train[N_TRAIN:])[:N_VALID]
    if (len(train[:N_TRAIN]), len(valid), len(test[:N_TEST])) != (N_TRAIN, N_VALID, N_TEST):
        raise ValueError(f'{task} has {len(train)} rows to train on and {len(test)} to test on')
    return train[:N_TRAIN], valid, test[:N_TEST]


def text_of(task):
    "What a soft prompt begins as."
    return f"Read the text and say which it is: {', '.join(form_labels(task))}. {FORMS[task][0]}"


def judge(model, tokenizer, task, rows):
    "(share of right answers, mean cross-entropy of the right label among the labels)."
    import torch
    from ftbook.data.examples import prompt_ids
    from ftbook.forgetting.choices import choice_ids, choice_scores

    names, right = form_labels(task), [label for _, label in rows]
    scores = choice_scores(
        model,
        [prompt_ids(r, tokenizer) for r, _ in rows],
        choice_ids(rows[0][0], [f' {name}' for name in names], tokenizer),
        max_tokens=1024,
    )
    y = torch.tensor([names.index(label) for label in right])
    return (scores.argmax(1) == y).float().mean().item(), torch.nn.functional.cross_entropy(scores.float(), y).item()


# Runs


def put(config, model, tokenizer, task, seed):
    "Put the method on the model."
    from ftbook.methods.bottleneck_method import Bottleneck
    from ftbook.methods.lora_method import LoRA
    from ftbook.methods.prompt_tuning import PromptTuning

    method, rank = config['method'], config['rank']
    if method == 'lora':
        LoRA(rank, config['alpha_ratio'] * rank, config['dropout'], MODULES[config['target_modules']], seed=seed).apply(
            model
        )
    elif method == 'houlsby':
        Bottleneck('houlsby', rank, dropout=config['dropout'], seed=seed).apply(model)
    elif method == 'prompt':
        PromptTuning(rank, 'text', text=text_of(task), tokenizer=tokenizer, seed=seed).apply(model)


def fresh(config):
    "(model, tokenizer, precision of the products where it is mixed): full fine-tuning needs weights in float32."
    full, half = config['method'] == 'full', config['precision'] == 'bfloat16'
    model, tokenizer = loaded('float32' if full or not half else 'bfloat16')
    return copy.deepcopy(model), tokenizer, 'bfloat16' if full and half else None


def halve_(model, full):
    "All are judged at the precision in which the model is used; what a method added stays as it is."
    import torch

    for p in model.parameters():
        if full or not p.requires_grad:
            p.data = p.data.to(torch.bfloat16)


@cache
def unrelated_texts():
    return unrelated(loaded('bfloat16')[1], N_UNRELATED)


@cache
def before():
    "Loss of the untouched model on unrelated text."
    from ftbook.training.evaluate import evaluate

    return evaluate(loaded('bfloat16')[0], unrelated_texts()).loss


def judged(model, tokenizer, task, seed):
    from ftbook.data.encoding import encode
    from ftbook.training.evaluate import evaluate

    _, valid, test = rows_of(task, seed)
    (valid_accuracy, valid_nats), (accuracy, nats) = (judge(model, tokenizer, task, rows) for rows in (valid, test))
    return dict(
        valid_accuracy=valid_accuracy,
        valid_nats=valid_nats,
        valid_loss=evaluate(model, encode([r for r, _ in valid], tokenizer)).loss,
        accuracy=accuracy,
        nats=nats,
        forgetting=evaluate(model, unrelated_texts()).loss - before(),
    )


def trained(config, task, seed):
    """One fine-tune: what it gave and what it cost; a run whose loss is no number any more has `diverged` and no
    measures."""
    import torch
    from ftbook.data.encoding import encode
    from ftbook.recipe.release import release_memory
    from ftbook.training.checks import NonFiniteLoss
    from ftbook.training.tune import finetune

    torch.manual_seed(seed)
    model, tokenizer, precision = fresh(config)
    examples = encode([r for r, _ in rows_of(task, seed)[0]], tokenizer)
    put(config, model, tokenizer, task, seed)
    release_memory()
    memory, begun, curve = Memory(), time.process_time(), []

    def note(state):
        curve.append(round(state.history[-1]['loss'], 4))

    try:
        finetune(
            model,
            examples,
            lr=config['lr'],
            batch_size=config['batch_size'],
            epochs=config['epochs'],
            warmup=config['warmup'],
            precision=precision,
            mixed=precision is not None,
            seed=seed,
            callbacks=[note],
            progress=False,
        )
    except NonFiniteLoss:
        diverged = True
    else:
        diverged = False
    cost = dict(
        cpu_seconds=round(time.process_time() - begun, 2),
        peak_bytes=memory.stop(),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        curve=curve,
        diverged=diverged,
    )
    halve_(model, config['method'] == 'full')
    return cost | ({} if diverged else judged(model, tokenizer, task, seed))


def one(part, task, seed, config):
    "One run: its settings, its measures, and the seconds of all that."
    start = time.process_time()
    if part == 'base':
        found = judged(*loaded('bfloat16'), task, seed)
    elif config['method'] == 'setfit':
        found = few_shots(task, seed)
    else:
        found = trained(config, task, seed)
    found = {k: (round(v, 5) if math.isfinite(v) else None) if isinstance(v, float) else v for k, v in found.items()}
    settings = {k: v for k, v in config.items() if v is not None}
    return settings | found | dict(all_seconds=round(time.process_time() - start, 1))


def few_shots(task, seed):
    "A classifier of the same rows, with the defaults of `FewShotClassifier`; the language model is left alone."
    from ftbook.fewshot.classifier import FewShotClassifier

    train, valid, test = (
        [(r['prompt'].rpartition('\n')[0], label) for r, label in rows] for rows in rows_of(task, seed)
    )
    model = FewShotClassifier(device='cpu')
    memory, begun = Memory(), time.process_time()
    model.fit(*map(list, zip(*train)))
    cost = dict(
        cpu_seconds=round(time.process_time() - begun, 2), peak_bytes=memory.stop(), trained=0, curve=[], diverged=False
    )

    def right(rows):
        return sum(said == label for said, (_, label) in zip(model.predict([text for text, _ in rows]), rows)) / len(
            rows
        )

    return cost | dict(valid_accuracy=right(valid), accuracy=right(test), forgetting=0.0)


def recommended(task, seed):
    """What the library says about the rows, given what the model needs in memory and no other knowledge than that of
    `TASKS`: settings of LoRA, and before them SetFit where it says so."""
    from ftbook.choose.recommend import Circumstances, recommend

    rows = [dict(text=r['prompt'].rpartition('\n')[0], label=label) for r, label in rows_of(task, seed)[0]]
    circumstances = Circumstances(known=knows(task))
    found = recommend(rows, memory_gib=16, device='cpu', encoder=None, circumstances=circumstances)
    return [found.settings()] + [dict(method='setfit')] * (found.decision.choice == 'SetFit')


# The plan


def numbers(part, runs):
    "(seed, number, task) of every run of a part."
    tasks = PARTS[part]
    if part in ('base', 'recommended'):
        return [(seed, 0, task) for seed in (SEED, *SEEDS) for task in tasks]
    if part == 'best':
        return [(seed, i, task) for seed in SEEDS for task in tasks for i in best(runs, task)]
    return [(SEED, i, task) for i in range(DESIGNED if part == 'design' else SEARCHED) for task in tasks]


def config_of(run):
    return {name: run.get(name) for name in SETTINGS}


def best(runs, task):
    """The numbers of the configurations of each method with the lowest validation cross-entropy; none before the design
    is complete."""
    done = [r for r in runs if (r['part'], r['task']) == ('design', task)]
    if len(done) < DESIGNED:
        return []
    good = sorted((r for r in done if r.get('valid_nats') is not None), key=lambda r: r['valid_nats'])
    return [r['number'] for method, n in BEST.items() for r in [r for r in good if r['method'] == method][:n]]


def knows(task):
    "Is the untouched model at least a third of the way from chance to perfect? A reader finds out by asking it."
    runs, chance = Study('sweep').read()['runs'], 1 / len(form_labels(task))
    right = statistics.mean(r['accuracy'] for r in runs if (r['part'], r['task']) == ('base', task))
    return (right - chance) / (1 - chance) > 1 / 3


# What ships


def summarize(results):
    "Write the runs and what other studies found where the library reads them; nothing is left for the harness to write."
    import pyarrow.parquet as pq
    from ftbook.files import write_text

    table = as_table(results)
    beside = ASSETS / 'sweep.writing'
    pq.write_table(table, beside, compression='zstd')
    beside.replace(ASSETS / 'sweep.parquet')
    write_text(ASSETS / 'evidence.json', json.dumps(evidence(results['runs']), indent=1) + '\n')


def as_table(results):
    "All runs without their losses, one a row, with all that is known of them in the metadata of its schema."
    import pyarrow as pa

    order = {part: i for i, part in enumerate(PARTS)}
    runs = sorted(results['runs'], key=lambda r: (order[r['part']], r['task'], r['seed'], r['number']))
    about = {k: v for k, v in results.items() if k != 'runs'}
    columns = dict.fromkeys([*KEY, *SETTINGS, *(k for r in runs for k in r if k != 'curve')])
    return pa.table({c: [r.get(c) for r in runs] for c in columns}).replace_schema_metadata(
        {'ftbook': json.dumps(about)}
    )


def mean(values):
    return round(statistics.mean(values), 4)


def evidence(runs):
    "What `ftbook.choose` needs of other studies: learning curves, the untouched model, methods side by side, merging."
    return dict(
        curves=learning_curves(),
        zero_shot={
            t: mean([r['accuracy'] for r in runs if (r['part'], r['task']) == ('base', t)]) for t in ('movie', 'tweets')
        },
        methods=side_by_side(),
        merging=merging(Study('merge_tasks').read()['runs']),
    )


def learning_curves():
    "Task -> way -> rows -> mean accuracy."
    curves = {}
    for r in Study('curves').read()['runs']:
        if r['part'] == 'curve':
            for n, accuracy in r['scores'].items():
                curves.setdefault(r['task'], {}).setdefault(r['how'], {}).setdefault(int(n), []).append(accuracy)
    for r in Study('fewshot').read()['runs']:
        if r.get('way') == 'checked' and r['task'] in curves and 'accuracy' in r:
            rows = r['shots'] * (20 if r['task'] == 'newsgroups' else 2)
            curves[r['task']].setdefault('setfit', {}).setdefault(rows, []).append(r['accuracy'])
    return {
        t: {w: {str(n): mean(v) for n, v in sorted(c.items())} for w, c in ways.items()} for t, ways in curves.items()
    }


def side_by_side():
    "Task -> variant -> mean accuracy and forgetting."
    wanted = 'full', 'LoRA 16', 'Houlsby 70', 'prompt 32, text'
    rows = read_results(RESULTS / 'methods_summary.jsonl')['rows']
    return {
        t: {
            r['variant']: {m: r[m][0] for m in ('accuracy', 'forgetting')}
            for r in rows
            if r['task'] == t and r['variant'] in wanted
        }
        for t in TASKS
    }


def merging(runs):
    "TIES on pairs of fine-tunes, beside each alone and the base: shares of right answers."

    def share(text):
        return text.count('1') / len(text)

    bounds = {r['tasks'][0]: r['right'] for r in runs if r['part'] == 'bound'}
    pairs = [r for r in runs if (r['part'], r.get('method'), len(r['tasks'])) == ('tasks', 'ties', 2)]
    return dict(
        tasks=2,
        merged=mean([share(v) for r in pairs for v in r['right'].values()]),
        own=mean([share(bounds[t][t]) for r in pairs for t in r['tasks']]),
        base=mean([share(bounds['base'][t]) for r in pairs for t in r['tasks']]),
    )
