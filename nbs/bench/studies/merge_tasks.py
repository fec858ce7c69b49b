"""Six fine-tunes of SmolLM2-135M, merged in many ways, and what each merge still knows.

All weights are trained, on 128 rows a task, twice, 8 to a step; part 'training' is one fine-tune, kept in the cache of ftbook and made
again where it lacks. A merge is made in memory from float32 tensors, put into one model in bfloat16 (float32 where the CPU lacks
it), and asked about the same held-out rows of each task; the answer is the most probable of the task's labels. A run keeps, for each
task, which rows were right (a string of 0 and 1, in the order of the rows, so that two merges can be compared row by row) and the mean
cross-entropy of the right label among the labels.
"""

import hashlib, itertools, json, time
from functools import cache, lru_cache

from tasks import FORMS, asked, form_labels, form_rows

KEY = 'part', 'tasks', 'method', 'settings', 'weights'
PACKAGES = 'torch', 'transformers', 'numpy'
PER_PROCESS = 0  # one process reads the fine-tunes once
N_TRAIN, N_TEST, N_VALID = 128, 60, 60
TRAINING = dict(lr=1e-4, batch_size=8, epochs=2, seed=0)
NAMES = tuple(FORMS)


def plan(runs):
    "The fine-tunes, then every merge."
    for name in (*NAMES, 'all tasks'):
        yield dict(part='training', tasks=[name])
    for part, tasks, method, settings, weights in dict.fromkeys(jobs()):
        yield dict(part=part, tasks=list(tasks), method=method, settings=dict(settings), weights=list(weights))


def run(job):
    "What a merge still knows, or what a part is about."
    part, tasks = job['part'], job['tasks']
    if part == 'training':
        return tune(tasks[0])
    start, (method, settings, weights) = time.perf_counter(), (job[k] for k in ('method', 'settings', 'weights'))
    if part == 'bound':
        found = bound(tasks[0])
    elif part == 'conflict':
        found = clash(tasks, method, settings['density'])
    elif part == 'written':
        found = written(tasks, method, settings, weights)
    elif part == 'search':
        found = look_for(tasks, **settings)
    else:
        found = merge_run(tasks, method, settings, weights)
    return found | dict(seconds=round(time.perf_counter() - start, 1))


# Rows


@cache
def rows_of(task):
    "(train, validation, test): rows of ftbook.data with their label, all labels in turn."
    train, test = form_rows(task, 0)
    if len(train) < N_TRAIN or len(test) < N_TEST + N_VALID:
        raise ValueError(f'{task} has {len(train)} rows to train on and {len(test)} others')
    return train[:N_TRAIN], test[N_TEST : N_TEST + N_VALID], test[:N_TEST]


# Models


def half():
    "The precision in which a model is used."
    from ftbook.models.device import probe_device

    return probe_device('cpu').dtype


@cache
def judge():
    "(model, tokenizer): the one model whose weights are replaced, at the precision in which it is used."
    from ftbook.models.load import load_model

    return load_model('smollm2-135m', dtype=half(), device='cpu')


def file_of(name):
    "Where a fine-tuned model is kept; the name holds what it was made with."
    from ftbook.files import cache_dir

    tasks = NAMES if name == 'all tasks' else [name]
    made = json.dumps([TRAINING, str(half()), [rows_of(t)[0] for t in tasks]])
    return (
        cache_dir()
        / 'bench'
        / 'merge_tasks'
        / f"{name.replace(' ', '-')}-{hashlib.sha256(made.encode()).hexdigest()[:12]}.safetensors"
    )


def tune(name):
    "Train a model on one task, or on all of them together, and keep it."
    import torch
    from ftbook.data.encoding import encode
    from ftbook.models.load import load_model
    from ftbook.training.tune import finetune
    from safetensors.torch import save_file

    start, (model, tokenizer) = time.perf_counter(), load_model('smollm2-135m', dtype='float32', device='cpu')
    torch.manual_seed(TRAINING['seed'])
    rows = [r for turn in zip(*(rows_of(t)[0] for t in (NAMES if name == 'all tasks' else [name]))) for r in turn]
    examples = encode(asked(rows), tokenizer)
    trained = finetune(model, examples, **TRAINING, mixed=half() == torch.bfloat16, progress=False)
    file = file_of(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix('.writing')
    save_file({k: p.detach().contiguous() for k, p in model.named_parameters()}, beside)
    beside.replace(file)
    return dict(
        rows=len(rows),
        steps=len(trained.history),
        first_loss=round(trained.history[0]['loss'], 4),
        last_loss=round(sum(h['loss'] for h in trained.history[-8:]) / 8, 4),
        seconds=round(time.perf_counter() - start, 1),
    )


@cache
def state(name):
    "Float32 tensors of a model, or of the base; a fine-tune that the cache lacks is made."
    from ftbook.models.shipped import model_folder
    from safetensors.torch import load_file

    if name != 'base':
        if not file_of(name).exists():
            tune(name)
        return load_file(file_of(name))
    found = load_file(model_folder('smollm2-135m') / 'model.safetensors')
    return {k: found[k].float() for k, _ in judge()[0].named_parameters()}


# Judging


@cache
def questions(task, part):
    "(token ids of the prompts, those of the labels, the right ones)."
    from ftbook.data.examples import prompt_ids
    from ftbook.forgetting.choices import choice_ids

    tokenizer, names, rows = judge()[1], form_labels(task), rows_of(task)[dict(valid=1, test=2)[part]]
    return (
        [prompt_ids(r, tokenizer) for r in asked(rows)],
        choice_ids(asked(rows[:1])[0], [f' {n}' for n in names], tokenizer),
        [names.index(r['label']) for r in rows],
    )


def score(task, part='test'):
    "What the model that stands in `judge` answers: (a character a row, mean cross-entropy among the labels)."
    import torch
    from ftbook.forgetting.choices import choice_scores

    prompts, labels, right = questions(task, part)
    found, right = choice_scores(judge()[0], prompts, labels, max_tokens=512), torch.tensor(right)
    return ''.join('01'[int(x)] for x in found.argmax(1) == right), round(
        torch.nn.functional.cross_entropy(found, right).item(), 5
    )


def put_(tensors):
    "Replace the weights of the judged model."
    import torch

    with torch.no_grad():
        for k, p in judge()[0].named_parameters():
            p.copy_(tensors[k])


def answers(tensors, tasks, part='test'):
    "Right rows and cross-entropies of a model on some tasks."
    put_(tensors)
    found = {t: score(t, part) for t in tasks}
    return dict(right={t: f[0] for t, f in found.items()}, nats={t: f[1] for t, f in found.items()})


# Merges


@lru_cache(12)
def trimmed(name, density):
    """A model whose task vector keeps its largest entries, tensor by tensor; the first step of TIES, done once for all
    weights."""
    from ftbook.merging.states import merge_states

    return merge_states('ties', state('base'), [state(name)], weight=[1.0], density=density)


def merged(method, tasks, weights, seed=0, **settings):
    "Float32 tensors of a merge."
    from ftbook.merging.recipes import RECIPES
    from ftbook.merging.states import merge_states

    models, settings = [state(t) for t in tasks], dict(settings)
    if method == 'ties':
        density = settings.pop('density')
        models = [trimmed(t, density) for t in tasks]
    # from the first to the second
    if method == 'slerp':
        return merge_states(method, models[0], models[1:], t=weights[1] / sum(weights))
    # some methods find their own
    given = settings | (dict(weight=list(weights)) if weights else {})
    return merge_states(method, state('base') if RECIPES[method].base else None, models, seed=seed, **given)


def entry_counts(models):
    "(entries, those that two or more task vectors move, those on which they disagree)."
    import torch

    n = moved = against = 0
    for k, b in state('base').items():
        d = torch.stack([m[k] for m in models]) - b
        up, down = (d > 0).sum(0), (d < 0).sum(0)
        n, moved, against = (
            n + b.numel(),
            moved + int((up + down > 1).sum()),
            against + int(((up > 0) & (down > 0)).sum()),
        )
    return n, moved, against


def thinned(name, i, density, seed=0):
    "A model whose task vector lost entries by lot, the same ones as in a merge where it comes i-th."
    import torch
    from ftbook.merging.methods import keep_mask

    base = state('base')
    return {
        k: torch.where(torch.from_numpy(keep_mask(f'{seed}/{k}/{i}', 0, t.numel(), density)).view(t.shape), t, base[k])
        for k, t in state(name).items()
    }


# What the parts measure


def bound(name):
    "A model as it is, on every task."
    return answers(state(name), NAMES)


def merge_run(tasks, method, settings, weights):
    return answers(merged(method, tasks, weights, **settings), tasks)


def clash(tasks, how, density):
    """Sign conflicts of some task vectors, all of their entries or those that trimming or lot leave; with the cosine
    where there are two."""
    import torch

    models = [
        state(t) if density == 1 else trimmed(t, density) if how == 'ties' else thinned(t, i, density)
        for i, t in enumerate(tasks)
    ]
    n, moved, against = entry_counts(models)
    found = dict(entries=n, moved_by_two=moved, conflicts=against)
    if len(tasks) == 2:
        products = sum(
            torch.stack(
                [
                    (a[k] - b).double().flatten() @ (c[k] - b).double().flatten()
                    for a, c in ((models[0], models[1]), (models[0], models[0]), (models[1], models[1]))
                ]
            )
            for k, b in state('base').items()
        )
        found['cosine'] = round(float(products[0] / (products[1] * products[2]).sqrt()), 5)
    return found


def look_for(tasks, start, trials):
    "`search` on the validation rows, then the first and the best weights on the test rows."
    from ftbook.merging.search import search

    def good(weights):
        return -sum(answers(merged('task_arithmetic', tasks, weights), tasks, 'valid')['nats'].values()) / len(tasks)

    found = search(good, [start] * len(tasks), high=1.2, trials=trials)
    pair = {
        name: dict(weights=[round(x, 4) for x in w], **answers(merged('task_arithmetic', tasks, w), tasks))
        for name, w in (('start', [start] * len(tasks)), ('best', found.weights))
    }
    return dict(tried=[[[round(x, 4) for x in w], round(s, 5)] for w, s in found.tried], **pair)


def written(tasks, method, settings, weights, rows=3, tokens=3):
    "What the base and the merged model write behind the first prompts of each task, freely and greedily."
    from ftbook.data.examples import prompt_ids
    import torch

    model, tokenizer = judge()

    def write(r):
        ids = torch.tensor([prompt_ids(asked([r])[0], tokenizer)])
        with torch.no_grad():
            return tokenizer.decode(
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=tokens,
                    do_sample=False,
                    pad_token_id=tokenizer.eos_token_id,
                )[0, ids.shape[1] :]
            )

    said = {}
    for name, tensors in (('base', state('base')), ('merged', merged(method, tasks, weights, **settings))):
        put_(tensors)
        said[name] = {t: [write(r) for r in rows_of(t)[2][:rows]] for t in tasks}
    return dict(
        prompts={t: [dict(prompt=r['prompt'], label=r['label']) for r in rows_of(t)[2][:rows]] for t in tasks},
        said=said,
    )


# The plan

PAIR, THREE = ('products', 'newsgroups'), ('products', 'newsgroups', 'r8')
DENSITIES = 0.2, 0.5, 0.9
THINNED = 'ties', 'dare_linear_paper', 'dare_ties_paper'
DEFAULT = {
    'linear': {},
    'task_arithmetic': {},
    'ties': dict(density=0.2),
    'dare_ties_paper': dict(density=0.2, normalize=True),
    'breadcrumbs': dict(density=0.9),
}
# weight of every task where they are added up; 1/k in a soup, and equal shares where a recipe divides by the sum
FIXED = 0.4


def default_weights(method, k):
    return [1 / k if method == 'linear' else FIXED if method in ('task_arithmetic', 'breadcrumbs') else 1.0] * k


def groups():
    "Two choices of k tasks for k from 2 to 5, and all six."
    for k in range(2, 7):
        yield from dict.fromkeys(
            tuple(NAMES[(first + i) % 6] for i in range(k)) if k < 6 else NAMES for first in (0, 3)
        )


def plane():
    return [
        (method, dict(density=d) | ({} if method == 'dare_linear_paper' else dict(normalize=False)), (0, 0.5, 1))
        for method in THINNED
        for d in DENSITIES
    ] + [('task_arithmetic', {}, (0, 0.25, 0.5, 0.75, 1))]


def triangle():
    "(method, settings, what the weights add up to)."
    return [
        ('task_arithmetic', {}, 1),
        ('task_arithmetic', {}, 2),
        *(('ties', dict(density=d), 1) for d in DENSITIES),
        *(('dare_ties_paper', dict(density=d, normalize=True), 1) for d in DENSITIES),
        *(('dare_linear_paper', dict(density=d), 2) for d in DENSITIES),
    ]


def others():
    "(tasks, method, settings, weights): methods that are on no grid; some find their own weights."
    for tasks in (PAIR, THREE):
        k = len(tasks)
        yield from ((tasks, m, {}, ()) for m in ('karcher', 'model_stock', 'sce'))
        yield from (
            (tasks, m, s, [w] * k)
            for m, s in (('breadcrumbs', dict(density=0.9)), ('della_linear_paper', dict(density=0.5)))
            for w in (0.5, 1)
        )
        yield from (
            (tasks, m, s, [w] * k) for m, s, w in (('linear', {}, 1 / k), ('della_paper', dict(density=0.5), 1))
        )
    yield from ((PAIR, 'linear', {}, (a, 1 - a)) for a in (0.25, 0.75))
    yield from ((PAIR, 'slerp', {}, (a, 1 - a)) for a in (0.25, 0.5, 0.75))


THIRDS = [(a / 3, b / 3, (3 - a - b) / 3) for a in range(4) for b in range(4 - a)]
SEEDS, SEED_DENSITIES = 6, (0.05, 0.2, 0.5)


def job(part, tasks, method='', settings=None, weights=()):
    if settings is None:
        settings = {}
    return part, tuple(tasks), method, tuple(sorted(settings.items())), tuple(round(w, 4) for w in weights)


def on_plane(method, settings, steps):
    return [job('plane', PAIR, method, settings, (a, b)) for a in steps for b in steps if a or b]


def on_triangle(method, settings, total):
    return [job('triangle', THREE, method, settings, [total * w for w in share]) for share in THIRDS]


def jobs():
    "Every merge, in order: the bounds, then something of each part, then the rest."

    def first(d):
        return d in ({}, dict(density=0.2), dict(density=0.2, normalize=False), dict(density=0.2, normalize=True))

    yield from (job('bound', [name]) for name in ('base', *NAMES, 'all tasks'))
    yield from on_plane('task_arithmetic', {}, (0, 0.5, 1))
    yield job('written', PAIR, 'task_arithmetic', {}, (0.5, 0.5))
    yield from (j for m, s, steps in plane() if first(s) for j in on_plane(m, s, steps) if m == 'ties')
    yield from (job('conflict', pair, 'ties', dict(density=1.0)) for pair in itertools.combinations(NAMES, 2))
    yield from (
        job('tasks', tasks, m, s, default_weights(m, len(tasks))) for tasks in groups() for m, s in DEFAULT.items()
    )
    yield from (
        job('seeds', PAIR, 'dare_linear_paper', dict(density=d, seed=seed), (0.5, 0.5))
        for d in SEED_DENSITIES
        for seed in range(SEEDS)
    )
    yield from (j for m, s, steps in plane() if first(s) for j in on_plane(m, s, steps))
    yield from (j for m, s, total in triangle() if first(s) for j in on_triangle(m, s, total))
    yield job('search', THREE, 'task_arithmetic', dict(start=FIXED, trials=14))
    yield from (
        job('conflict', tasks, how, dict(density=d))
        for tasks in (PAIR, THREE)
        for how in ('ties', 'dare')
        for d in (*DENSITIES, 1.0)
        if how == 'ties' or d < 1
    )
    yield from (j for m, s, steps in plane() for j in on_plane(m, s, steps))
    yield from (j for m, s, total in triangle() for j in on_triangle(m, s, total))
    yield from (job('conflict', pair, 'ties', dict(density=0.2)) for pair in itertools.combinations(NAMES, 2))
    yield from (job('others', *o) for o in others())
