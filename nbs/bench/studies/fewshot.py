"""Few labels: a frozen encoder, full fine-tuning, SetFit, FastFit and the classifier of this book, six tasks.

Ways:
frozen      MiniLM-L6 as it is, logistic regression on top
full        all of the encoder and a linear head, trained on cross-entropy
setfit      SetFit with its defaults: one epoch of all its pairs, batches of 16
ours        `FewShotClassifier`, without the check
checked     `FewShotClassifier` with its defaults: the check decides whether the encoder is tuned
fastfit     FastFit with the settings of its README, but for 16-bit floats, which it has for CUDA alone
predict     sentences a second of a trained SetFit and of ours, on the same texts

The runs `upper` are those of `ours` with an earlier default, the upper half of the encoder and the similarity loss at every size;
`FewShotClassifier(tuning=Tuning(seed=seed))` makes them. All take the same rows, encoder and number of threads. `seconds` is
from the labelled texts to a trained classifier, by the clock; `cpu_seconds` is the processor time of the same, which a busy
machine blurs less.
"""

import json, os, random, tempfile, time
from functools import cache
from pathlib import Path

from tasks import ALL, FEW_TASKS, FORMS, MADE, MADE_CLASSES, MANY, NEWSGROUPS, SHOTS, split_few

KEY = 'way', 'task', 'shots', 'seed'
PACKAGES = 'torch', 'transformers', 'scikit-learn', 'numpy'
PER_PROCESS, THREADS = 24, 1
WAYS = 'frozen', 'ours', 'checked', 'full', 'setfit', 'predict', 'fastfit'
SEEDS = 10
# SetFit runs of no more steps than that have ten seeds; longer ones are timed once here (their accuracy is measured on a GPU)
WHOLE = 50
# up to so many steps, the seeds after the first are whole runs of ten minutes and more
LONG, LONG_SEEDS = 600, 3
FEW_SEEDS = 2
DOUBTFUL = 'groups', 16  # where tuning turned out to do harm: the check has ten seeds
# a longer run is timed by these and its time taken in proportion; its accuracy is not measured
TIMED_STEPS = 40
# of each task at 8 rows a class; a run of more steps is timed by ten
FASTFIT_SEEDS, FASTFIT_STEPS, FASTFIT_TIMED = 1, 10, 10
# epochs, but no more than `most` steps, and `least` epochs in any case
FULL = dict(lr=5e-5, epochs=20, batch_size=16, most=200, least=3)


def plan(runs):
    "The cheap ways first, then seed by seed."
    for way in WAYS:
        for shots in (*SHOTS, ALL):
            for seed in range(SEEDS):
                for task in (*FEW_TASKS, MANY, MADE):
                    if seed < seeds(way, task, shots):
                        yield dict(way=way, task=task, shots=shots, seed=seed)


def run(job):
    "Accuracy and time of one classifier."
    warm()
    return one(**job)


@cache
def warm():
    "The first run of a process is slower, and is not kept."
    one('ours', 'movie', 8, 0)


def one(way, task, shots, seed):
    "What a way gave on one draw of the rows."
    train, test = split_few(task, shots, seed)
    texts, labels = columns(train)
    test_texts, truth = columns(test)
    maker = dict(frozen=frozen, ours=ours, checked=checked, full=full, setfit=setfit, predict=predict, fastfit=fastfit)[
        way
    ]
    times, said, more = maker(texts, labels, test_texts, seed)
    accuracy = {} if said is None else dict(accuracy=round(sum(a == b for a, b in zip(said, truth)) / len(truth), 4))
    return dict(
        **accuracy,
        **{k: round(v, 2) for k, v in times.items()},
        rows=len(texts),
        test_rows=len(truth),
        threads=int(os.environ.get('OMP_NUM_THREADS', 0)),
        **more,
    )


def columns(rows):
    "(texts, labels)."
    return [r['text'] for r in rows], [r['label'] for r in rows]


# How many seeds


def n_classes(task):
    "Classes of a task of few labels."
    if task == MADE:
        return MADE_CLASSES
    return len(NEWSGROUPS) if task == MANY else len(FORMS[MANY if task == 'groups' else task][1])


def setfit_steps(task, shots):
    "Steps of an epoch of all pairs."
    from ftbook.fewshot.pairs import count_pairs

    return count_pairs([shots] * n_classes(task))['setfit_steps']


def fastfit_steps(n_rows):
    "Steps of its forty epochs."
    return 40 * -(-n_rows // 32)


def seeds(way, task, shots):
    "How many seeds a way has."
    if shots == ALL:
        return 1 if way in ('frozen', 'full') and task in FEW_TASKS else 0
    if way == 'predict':
        return 1 if shots == 8 and task in FEW_TASKS else 0
    if way == 'fastfit':
        if shots != 8 or task not in FEW_TASKS:
            return 0
        return FASTFIT_SEEDS if fastfit_steps(shots * n_classes(task)) <= FASTFIT_STEPS else 1
    # SetFit would list its pairs, 34 millions of 64 rows a class
    if task == MADE:
        return 1 if way == 'ours' or (way, shots) == ('setfit', min(SHOTS)) else 0
    if way == 'setfit':
        steps = setfit_steps(task, shots)
        return SEEDS if steps <= WHOLE else LONG_SEEDS if steps <= LONG and shots > 16 else 1
    if task == MANY:
        return 1 if way == 'ours' else 0
    if way == 'checked':
        return SEEDS if (task, shots) == DOUBTFUL else {8: SEEDS // 2, 16: FEW_SEEDS}.get(shots, 1)
    return SEEDS


# The ways; each gives (times, answers of the test texts or None, more)


class Clock:
    "Seconds since it was made."

    def __init__(self):
        self.start = time.perf_counter()
        self.cpu = time.process_time()

    def read(self):
        return dict(seconds=time.perf_counter() - self.start, cpu_seconds=time.process_time() - self.cpu)


def ours(texts, labels, test, seed, check=False, tuning=True):
    "The classifier of this book, with its defaults but for the check."
    from ftbook.fewshot.classifier import FewShotClassifier

    model = FewShotClassifier(device='cpu', seed=seed, tuning='auto' if tuning else None)
    clock = Clock()
    model.fit(texts, labels, check=check, progress=False)
    times, c = clock.read(), model.checked
    more = dict(tuned=model.tuned)
    if c:
        more |= dict(
            held_out={w: round(c.right(w), 4) for w in ('frozen', 'tuned')},
            gain=[round(x, 4) for x in c.gain],
            change=[round(x, 4) for x in c.change],
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
    head = torch.nn.Linear(body.encoder.config.hidden_size, len(classes))
    ids, *_ = body.ids(texts)
    y = torch.tensor([classes.index(l) for l in labels])
    params = [*(p for n, p in body.encoder.named_parameters() if 'pooler' not in n), *head.parameters()]
    rng, size, order = random.Random(seed), FULL['batch_size'], []
    epoch = -(-len(ids) // size)
    n = min(FULL['epochs'] * epoch, max(FULL['most'], FULL['least'] * epoch))
    rates = [dict(params=params[:-2], lr=FULL['lr']), dict(params=params[-2:], lr=1e-2)]
    optimizer = torch.optim.AdamW(rates, weight_decay=0.01)
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


# Rivals, each in its own environment


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
PREDICT = """
import json, sys, time
from setfit import SetFitModel
model = SetFitModel.from_pretrained(sys.argv[1], device='cpu')
texts = json.load(sys.stdin)
model.predict(texts[:8])
start, cpu = time.perf_counter(), time.process_time()
said = model.predict(texts)
print(json.dumps([time.perf_counter() - start, time.process_time() - cpu, [str(x) for x in said]]))
"""


def answer(rival, code, given, *arguments):
    "What a rival's program says in its last line."
    from rivals import ask

    return json.loads(ask(rival, code, *arguments, given=json.dumps(given)).splitlines()[-1])


def task_of(texts, labels, test, seed, most):
    "What a rival is told; `most` is the number of steps that it is timed by, 0 for all."
    from ftbook.models.shipped import model_folder

    return dict(
        texts=texts,
        labels=labels,
        test=test,
        seed=seed,
        most=most,
        encoder=str(model_folder('minilm-l6')),
        out=tempfile.mkdtemp(),
    )


def in_proportion(found, steps, some):
    "The times of all steps, from those of some."
    return {k: found[k] * (steps / some if some else 1) for k in ('seconds', 'cpu_seconds')}


def setfit(texts, labels, test, seed):
    from ftbook.fewshot.pairs import count_pairs

    steps = count_pairs([labels.count(c) for c in sorted(set(labels))])['setfit_steps']
    whole = steps <= WHOLE or seed > 0
    some = 0 if whole else TIMED_STEPS
    found = answer('setfit', SETFIT, task_of(texts, labels, test, seed, some) | dict(device='cpu'))
    return in_proportion(found, steps, some), found['said'] if whole else None, dict(steps=steps, whole=whole)


def fastfit(texts, labels, test, seed):
    steps = fastfit_steps(len(texts))
    some = FASTFIT_TIMED if steps > FASTFIT_STEPS else 0
    found = answer('fastfit', FASTFIT, task_of(texts, labels, test, seed, some))
    return in_proportion(found, steps, some), None if some else found['said'], dict(steps=steps, whole=not some)


def predict(texts, labels, test, seed):
    "Both on the test texts, four times over; SetFit reads the model that ours has written for it."
    from ftbook.fewshot.classifier import FewShotClassifier
    from ftbook.fewshot.exchange import export_setfit

    model, many = FewShotClassifier(device='cpu', tuning=None).fit(texts, labels), test * 4
    model.predict(many[:8])
    clock = Clock()
    said = model.predict(many)
    times = clock.read()
    folder = export_setfit(model, Path(tempfile.mkdtemp()) / 'model')
    theirs, theirs_cpu, answers = answer('setfit', PREDICT, many, folder)
    more = dict(
        setfit_seconds=round(theirs, 2),
        setfit_cpu_seconds=round(theirs_cpu, 2),
        sentences=len(many),
        same=sum(a == b for a, b in zip(said, answers)) / len(many),
    )
    return times, said[: len(test)], more
