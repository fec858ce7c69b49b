"""What `merge.ipynb` measures: merges against mergekit 0.1.5, which lives in an environment of its own.

    python merge_worker.py parity             write results/merge_parity.json; needs FTBOOK_MERGEKIT_PYTHON
    python merge_worker.py answer FOLDER      run by mergekit's interpreter: merge every configuration in FOLDER
    python merge_worker.py speed              every run that is missing, appended to results/merge.json one by one
    python merge_worker.py ours CONFIG OUT    one merge of ours, whole process
    python merge_worker.py theirs CONFIG OUT  one merge of mergekit's, whole process; run by its interpreter
    python merge_worker.py copy CONFIG OUT    read the inputs and write the output's bytes, whole process
    python merge_worker.py copies             what was tried against the distance to a copy, in turns, appended to results/merge.json; the machine need not be quiet
    python merge_worker.py big                synthetic models of up to 3 GB, merged under a memory limit, appended to results/merge.json
    python merge_worker.py limited CONFIG OUT one merge of ours that may hold no more than LIMIT bytes of data

FTBOOK_MERGEKIT_PYTHON names the interpreter that has mergekit. Both sides get the same files and the same YAML, and what is compared are the files that they write.
Where a method draws at random, the question comes with the random numbers, and mergekit's call of `torch.bernoulli` reads them instead.
"""

import json, os, shutil, subprocess, sys, tempfile, time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')

HERE = Path(__file__).resolve().parent
PARITY, SPEED = HERE / 'results' / 'merge_parity.json', HERE / 'results' / 'merge.json'
PYTHON = 'FTBOOK_MERGEKIT_PYTHON'
NAMES = 'red', 'blue', 'green'
SEED = 3


# The questions


def model(name, **kw):
    return dict(model=name, **({'parameters': kw} if kw else {}))


def three(weights=(1.0, 0.5, 0.7), **kw):
    return [model(n, weight=w, **kw) for n, w in zip(NAMES, weights)]


def question(method, models, base='base', **kw):
    return dict(merge_method=method, models=models, dtype='float32', **({'base_model': base} if base else {}), **kw)


GRADIENT = [dict(filter='self_attn', value=[0, 0.5, 0.3, 1]), dict(filter='mlp', value=[1, 0.2]), dict(value=0.5)]
QUESTIONS = {
    'linear': question('linear', three(), None),
    'linear, not normalized': question('linear', three(), None, parameters=dict(normalize=False)),
    'slerp': question('slerp', [model('base'), model('red')], parameters=dict(t=0.3)),
    'slerp, gradient and filters': question('slerp', [model('base'), model('red')], parameters=dict(t=GRADIENT)),
    'task_arithmetic': question('task_arithmetic', three()),
    'task_arithmetic, negation': question(
        'task_arithmetic', three((1.0, -0.8, 0.3)), parameters={'lambda': 0.6, 'normalize': True}
    ),
    'ties': question('ties', three(density=0.4)),
    'ties, equal weights': question('ties', three((0.5, 0.5, 0.5), density=0.4)),
    'ties, equal weights, sum': question('ties', three((0.5, 0.5, 0.5), density=0.4), parameters=dict(normalize=False)),
    'ties, sum': question(
        'ties', three(density=0.2), parameters={'normalize': False, 'lambda': 0.7, 'int8_mask': True}
    ),
    'ties, rescaled': question('ties', three(density=0.4), parameters=dict(rescale=True)),
    'ties, gradients': question('ties', [model(n, weight=GRADIENT, density=[1, 0.3, 0.1]) for n in NAMES]),
    'ties, base listed': question('ties', [model('base'), *three(density=0.4)]),
    'dare_linear': question('dare_linear', three(density=0.4)),
    'dare_linear, not rescaled': question('dare_linear', three(density=0.4), parameters=dict(rescale=False)),
    'dare_ties': question('dare_ties', three(density=0.4)),
    'breadcrumbs': question('breadcrumbs', three(density=0.6, gamma=0.1)),
    'breadcrumbs_ties': question('breadcrumbs_ties', three(density=0.6, gamma=0.1), parameters=dict(rescale=True)),
    'della': question('della', three(density=0.5, epsilon=0.3)),
    'della_linear': question('della_linear', three(density=0.5, epsilon=0.1)),
    'model_stock': question('model_stock', [model(n) for n in NAMES]),
    'model_stock, by row': question('model_stock', [model(n) for n in NAMES], parameters=dict(filter_wise=True)),
    'sce': question('sce', [model(n) for n in NAMES]),
    'sce, selected': question('sce', [model(n) for n in NAMES], parameters=dict(select_topk=0.3)),
    'karcher': question('karcher', [model(n) for n in NAMES], None),
    'passthrough, slices': dict(
        merge_method='passthrough',
        dtype='float32',
        slices=[
            dict(sources=[dict(model='red', layer_range=[0, 3])]),
            dict(sources=[dict(model='blue', layer_range=[1, 4])]),
        ],
    ),
    'slerp, slices': dict(
        merge_method='slerp',
        dtype='float32',
        base_model='base',
        parameters=dict(t=[0, 1]),
        slices=[dict(sources=[dict(model='base', layer_range=[1, 3]), dict(model='red', layer_range=[1, 3])])],
    ),
    'linear, a LoRA adapter': question('linear', [model('red', weight=1.0), model('base+adapter', weight=2.0)], None),
    'linear, union of tokens': question(
        'linear', [model('red', weight=1.0), model('more tokens', weight=2.0)], None, tokenizer_source='union'
    ),
    'ties, union of tokens, padded': question(
        'ties',
        [model('red', weight=1.0, density=0.5), model('more tokens', weight=2.0, density=0.5)],
        tokenizer=dict(source='union', pad_to_multiple_of=64),
    ),
    'task_arithmetic, tokens of the base': question(
        'task_arithmetic', [model('red', weight=1.0), model('more tokens', weight=2.0)], tokenizer_source='base'
    ),
    'ties, bfloat16 out': question('ties', three(density=0.4), out_dtype='bfloat16'),
}


def small(name, seed, tokens=0):
    "A small Llama; all but the base are the base and a little."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    made = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=tokens or 120,
            initializer_range=0.1,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.02 * bool(seed) * torch.randn(p.shape, generator=generator))
    return made


def words(n, extra=()):
    "A tokenizer of n words, and some that are added."
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({f'w{i}': i for i in range(n)}, [])))
    made.add_tokens(list(extra))
    return made


def ask(folder):
    "Write models, configurations and random numbers."
    import torch, yaml
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from ftbook.merging.chance import coins

    for seed, name in enumerate(('base', *NAMES)):
        small(name, seed).save_pretrained(folder / name, max_shard_size='60KB' if name == 'blue' else '1GB')
        words(118).save_pretrained(folder / name)
    small('more tokens', 9, 125).save_pretrained(folder / 'more tokens')
    words(118, ['<one>', '<two>', '<three>']).save_pretrained(folder / 'more tokens')
    adapted = get_peft_model(small('base', 0), LoraConfig(r=3, lora_alpha=5, target_modules=['q_proj', 'down_proj']))
    for p in adapted.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    adapted.save_pretrained(folder / 'adapter')
    shapes = {k: p.numel() for k, p in small('base', 0).named_parameters()}
    save_file(
        {
            f'{k}/{n}': torch.from_numpy(coins(f'{SEED}/{k}/{n}', 0, size).astype('int64'))
            for k, size in shapes.items()
            for n in NAMES
        },
        folder / 'coins.safetensors',
    )
    for i, c in enumerate(QUESTIONS.values()):
        (folder / f'{i}.yml').write_text(yaml.safe_dump(c))


# mergekit


class Coins:
    """Stands in for `torch.bernoulli`: knows which tensor of which model mergekit is at, and reads the random numbers
    that came with the question."""

    def __init__(self, file):
        from safetensors.torch import load_file

        self.numbers, self.group, self.at = load_file(file), None, 0

    def install(self):
        import torch
        from mergekit.merge_methods import generalized_task_arithmetic as g

        merge_group, sparsify = g.GeneralizedTaskArithmeticMerge.merge_group, g.sparsify

        def named(method, group, /, **parameters):
            self.group, self.at = group, -1
            return merge_group(method, group, **parameters)

        def counted(*args, **kw):
            self.at += 1
            return sparsify(*args, **kw)

        g.GeneralizedTaskArithmeticMerge.merge_group, g.sparsify, torch.bernoulli = named, counted, self.draw

    def draw(self, chances):
        drawn = self.numbers[f'{self.group.metadata.name}/{self.group.non_base[self.at].id}']
        return (drawn < (chances.double() * 2**32).long().view(-1)).view(chances.shape).to(chances.dtype)


def theirs(config, out, **options):
    "One merge by mergekit."
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    # the card asks the hub for every name
    run_merge(
        MergeConfiguration.model_validate(yaml.safe_load(Path(config).read_text())),
        str(out),
        MergeOptions(quiet=True, write_model_card=False, **options),
    )


def answer(folder):
    "Merge every configuration."
    Coins(folder / 'coins.safetensors').install()
    os.chdir(folder)
    for i in range(len(QUESTIONS)):
        theirs(f'{i}.yml', folder / f'theirs {i}', lora_merge_cache=str(folder / 'loras'))
    (folder / 'versions.json').write_text(json.dumps({p: version(p) for p in ('mergekit', 'transformers', 'torch')}))


# Ours


def tensors(folder):
    from safetensors.torch import load_file

    return {k: t for f in folder.glob('*.safetensors') for k, t in load_file(f).items()}


def compare(folder, i, name):
    "The largest difference of any tensor between the two answers."
    from ftbook.merging.engine import merge

    merge(str(folder / f'{i}.yml'), folder / f'ours {i}', seed=SEED, hashes=False)
    a, b = tensors(folder / f'ours {i}'), tensors(folder / f'theirs {i}')
    b = {k: t for k, t in b.items() if k in a or k != 'lm_head.weight'}
    if a.keys() != b.keys():
        raise ValueError(f'{name}: only one side has {sorted(a.keys() ^ b.keys())[:3]}')
    base = tensors(folder / 'base')
    config = [json.loads((folder / f'{side} {i}' / 'config.json').read_text()) for side in ('ours', 'theirs')]
    same = all(config[0].get(k) == config[1].get(k) for k in ('num_hidden_layers', 'vocab_size', 'dtype'))
    return dict(
        question=name,
        tensors=len(a),
        dtype=str(next(iter(a.values())).dtype).removeprefix('torch.'),
        largest=max(float((t.float() - b[k].float()).abs().max()) for k, t in a.items()),
        effect=max(float((t - base[k]).abs().max()) for k, t in a.items() if k in base and t.shape == base[k].shape),
        same_configuration=same,
    )


def parity(python=None):
    "Put every question to both sides: (runs, versions)."
    import ftbook

    with tempfile.TemporaryDirectory() as tmp:
        folder, here = Path(tmp), Path.cwd()
        ask(folder)
        done = subprocess.run(
            [python or os.environ[PYTHON], Path(__file__).resolve(), 'answer', folder], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f'mergekit could not answer: {done.stderr[-3000:]}')
        os.chdir(folder)
        try:
            runs = [compare(folder, i, name) for i, name in enumerate(QUESTIONS)]
        finally:
            os.chdir(here)
        versions = dict(
            ours={p: version(p) for p in ('torch', 'transformers', 'numpy')} | {'ftbook': ftbook.__version__},
            theirs=json.loads((folder / 'versions.json').read_text()),
        )
    return runs, versions


def read_parity():
    return json.loads(PARITY.read_text(encoding='utf-8'))


def measure_parity():
    "Ask, and write the results file."
    from domains_worker import where

    runs, versions = parity()
    here = {k: v for k, v in where(('torch', 'transformers', 'numpy')).items() if k != 'versions'}
    lines = ',\n'.join(json.dumps(run) for run in runs)
    PARITY.write_text(
        f'{{"machine": {json.dumps(here)},\n"versions": {json.dumps(versions)},\n"runs": [\n{lines}\n]}}\n',
        encoding='utf-8',
    )


# Speed: whole processes, three fine-tunes of SmolLM2-135M in bfloat16

METHODS = {'ties': dict(density=0.5), 'dare_ties': dict(density=0.5), 'task_arithmetic': {}}
ROUNDS = 3
UNEQUAL = 'ties, unequal weights'


def big_models(folder):
    "The base and three models that differ from it a little, in bfloat16, once."
    import torch
    from ftbook.models.load import load_model

    for seed, name in enumerate(('base', *NAMES)):
        if (folder / name / 'config.json').exists():
            continue
        made, tokenizer = load_model('smollm2-135m', dtype='float32', device='cpu')
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in made.parameters():
                p.add_(0.1 * bool(seed) * p.std() * torch.randn(p.shape, generator=generator))
        made.bfloat16().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def copy(config, out):
    "Read every input, and write as many bytes as the output has, in blocks: what no merge can do without."
    import yaml

    c = yaml.safe_load(Path(config).read_text())
    files = [next(Path(m).glob('*.safetensors')) for m in [c['base_model'], *(o['model'] for o in c['models'])]]
    out.mkdir(parents=True)
    with open(out / 'model.safetensors', 'wb') as to:
        for f in files:
            with open(f, 'rb', buffering=0) as source:
                while block := source.read(1 << 20):
                    if f == files[0]:
                        to.write(block)
        to.flush()
        os.fsync(to.fileno())


def process(side, config, out):
    "One side's whole process: seconds, and the most memory that it held."
    python = os.environ[PYTHON] if side == 'theirs' else sys.executable
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    # both sides may use every core
    free = {k: v for k, v in os.environ.items() if k not in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')}
    done = subprocess.run(
        [python, Path(__file__).resolve(), side, config, out], capture_output=True, text=True, env=free
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f'{side} {config}: {done.stderr[-2000:]}')
    cpu, inside, peak_kb = done.stdout.split()[-3:]
    return dict(seconds=round(seconds, 3), inside=float(inside), cpu=float(cpu), peak_mb=round(int(peak_kb) / 1024, 1))


def peak():
    "The most memory that this process has held, in KiB; it counts from its own start, which `getrusage` does not."
    return next(l for l in Path('/proc/self/status').read_text().splitlines() if l.startswith('VmHWM')).split()[1]


SIDES = 'theirs', 'ours', 'unhashed', 'copy'


def turn(folder, method, sides=SIDES):
    "Every side once, one after the other; what they write is gone afterwards."
    found = {side: process(side, folder / f'{method}.yml', folder / f'{method} {side}') for side in sides}
    for side in sides:
        shutil.rmtree(folder / f'{method} {side}')
    return found


def write_questions(folder):
    "The models, and one configuration for each method."
    import yaml

    big_models(folder)
    for name, (method, weights) in (
        {m: (m, (0.5, 0.5, 0.5)) for m in METHODS} | {UNEQUAL: ('ties', (0.5, 0.4, 0.3))}
    ).items():
        c = question(
            method,
            [dict(model=str(folder / n), parameters=dict(weight=w, **METHODS[method])) for n, w in zip(NAMES, weights)],
            str(folder / 'base'),
        ) | {'dtype': 'bfloat16'}
        (folder / f'{name}.yml').write_text(yaml.safe_dump(c))


def speed(folder=None):
    "Every round that is missing, on a quiet machine, appended one by one."
    from domains_worker import append, read
    from ftbook.files import cache_dir
    from quiet import undisturbed

    folder = folder or cache_dir() / 'merge_bench'
    write_questions(folder)
    for again in range(ROUNDS):
        for method in METHODS:
            if any(r.get('method') == method and r.get('round') == again for r in read(SPEED)['runs']):
                continue
            if found := undisturbed(lambda: turn(folder, method)):
                append([dict(method=method, round=again, others=found[1], **found[0])], SPEED, ('torch', 'numpy'))
            else:
                print(f'{method}: the machine was never quiet')


# What was tried against the distance to a copy: each attempt alone, in turns


def fill_forked(plan, folder, names, threads, hashes, progress):
    """In place of `_fill_files`: a forked process for each core, all of them taking tensors from one pipe, the largest
    first."""
    import numpy as np
    from ftbook.merging import write

    files, todo = {n: open(folder / n, 'r+b', buffering=0) for n in names}, sorted(plan.jobs, key=lambda j: -j.n)
    np.seterr(all='ignore')
    write._keep_memory()
    take, give = os.pipe()
    os.write(give, b''.join(i.to_bytes(2, 'little') for i in range(len(todo))))
    os.close(give)

    def work():
        while got := os.read(take, 2):
            write._make(
                plan, job := todo[int.from_bytes(got, 'little')], files[job.file], map, [True] * len(job.models)
            )

    def child():
        if pid := os.fork():
            return pid
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)

    if any(os.waitpid(pid, 0)[1] for pid in [child() for _ in range(threads)]):
        raise RuntimeError('a process failed')
    for f in files.values():
        os.fsync(f.fileno())
    (folder / write._DONE).write_text('')
    return {}, [True] * len(plan.jobs[0].models)


# Each sets a name in the module that uses it: the engine calls `_fill_files`, every tensor's `Parts` reads CHUNK.


def forked():
    from ftbook.merging import engine

    engine._fill_files = fill_forked


def small_pieces():
    from ftbook.merging import parts

    parts.CHUNK //= 4


def unkept():
    from ftbook.merging import write

    write._keep_memory = lambda: None


TRIED = dict(forked=forked, small=small_pieces, unkept=unkept)


def by_histogram(x, rank):
    "The k-th largest magnitude by counting upper halves: one pass counts, one collects the bin that holds it."
    import numpy as np

    upper = x.view(np.uint16)[1::2]  # little-endian: sign, exponent and seven bits
    above = np.cumsum(np.bincount(upper, minlength=1 << 15)[::-1])[::-1]
    bin_ = int(np.flatnonzero(above >= rank)[-1])
    inside = x[upper == bin_]
    nth = rank - (int(above[bin_]) - len(inside))
    return float(np.partition(inside, len(inside) - nth)[len(inside) - nth])


def selection(n=1 << 22, rank=1 << 21, tries=9):
    """What an exact threshold costs per entry: the engine's bracket, a histogram, a partition, a sort; best of some
    tries."""
    import numpy as np
    from ftbook.merging.parts import CHUNK
    from ftbook.merging.threshold import kth_largest

    x = np.abs(np.random.default_rng(0).standard_normal(n, np.float32))
    pieces = lambda f: [f(a, min(n, a + CHUNK)) for a in range(0, n, CHUNK)]
    ways = {
        'a bracket from a sample': lambda: kth_largest(lambda a, b: x[None, a:b], n, [rank], pieces)[0],
        'a histogram of upper halves': lambda: by_histogram(x, rank),
        'partition': lambda: float(np.partition(x, n - rank)[n - rank]),
        'sort': lambda: float(np.sort(x)[n - rank]),
    }

    def seconds(f):
        start = time.perf_counter()
        return f(), time.perf_counter() - start

    found = {name: [seconds(f) for _ in range(tries)] for name, f in ways.items()}
    if len({v for runs in found.values() for v, _ in runs}) > 1:
        raise ValueError('the ways do not agree')
    return dict(
        selection={name: round(min(s for _, s in runs) / n * 1e9, 3) for name, runs in found.items()}, entries=n
    )


def mixed(sample, share, widen):
    "The engine's bracket without a look at how runs differ, as if values were well mixed."
    import math
    import numpy as np

    s = len(sample)
    margin = widen * (3 * math.sqrt(share * (1 - share) * s) + 3)
    low, high = math.floor(s * (1 - share) - margin), math.ceil(s * (1 - share) + margin)
    ordered = np.sort(sample)
    return float(ordered[low]) if low >= 0 else -1.0, float(ordered[high]) if high < s else math.inf


def repeats(densities=(0.2, 0.5)):
    """How many passes over the tensors of SmolLM2 had to be made again because the bracket was missed: with the
    engine's width, and with that for mixed values."""
    from ftbook.merging import checkpoints as merging_checkpoints
    from ftbook.merging import parts as merging_parts
    from ftbook.merging import threshold as merging_threshold
    from ftbook.models.shipped import model_folder

    model, found = merging_checkpoints.Checkpoint('base', model_folder('smollm2-135m')), {}
    for name, bracket in dict(engine=merging_threshold._bracket, mixed=mixed).items():
        merging_threshold._bracket, passes, tensors = (
            bracket,
            [],
            [k for k, t in model.tensors.items() if t.kind in merging_checkpoints.KINDS],
        )
        for k in tensors:
            parts = merging_parts.Parts(
                k, model.tensors[k].shape, lambda start, stop, out: out.fill(0), [model.fill(k)]
            )
            each = parts.each

            def counted(f):
                return passes.append(k) or each(f)

            parts.each = counted
            for d in densities:
                merging_parts.tensor_thresholds(parts, [d])
        found[name] = len(passes) - len(tensors) * len(densities)
    return dict(repeats=found, thresholds=len(tensors) * len(densities))


def copies(folder=None):
    "Rounds that are missing, whatever else the machine does; how much that was is noted."
    from domains_worker import append, read
    from ftbook.files import cache_dir
    from quiet import disturbed

    folder = folder or cache_dir() / 'merge_bench'
    write_questions(folder)
    if not any('selection' in r for r in read(SPEED)['runs']):
        append([selection()], SPEED, ('torch', 'numpy'))
    if not any('repeats' in r for r in read(SPEED)['runs']):
        append([repeats()], SPEED, ('torch', 'numpy'))
    for again in range(ROUNDS):
        for method in (*METHODS, UNEQUAL):
            if any(r.get('copies') == method and r.get('round') == again for r in read(SPEED)['runs']):
                continue
            found, others = disturbed(lambda: turn(folder, method, ('ours', 'unhashed', *TRIED, 'copy')))
            append([dict(copies=method, round=again, others=round(others, 3), **found)], SPEED, ('torch', 'numpy'))


# Size: synthetic models of up to 3 GB under a memory limit

# bytes of data (heap, anonymous mappings, stacks) that the merging process may have
LIMIT = 512 << 20
SIZES = 750_000_000, 1_500_000_000, 3_000_000_000  # of one model
COUNTS = 2, 3, 4  # models, the base among them
ROWS, WIDTH, VOCABULARY = 4096, 4096, 32768  # the matrices, and the largest tensor: 268 MB


def synthetic(folder, size, name, seed):
    """One model in bfloat16: blocks of seeded noise, cut at another place for every tensor; all but the base are the
    base and a little."""
    import torch

    shapes = [('embed_tokens.weight', VOCABULARY, WIDTH)]
    while sum(2 * a * b for _, a, b in shapes) < size:
        shapes.append((f'layers.{len(shapes) - 1}.mlp.weight', ROWS, WIDTH))
    noise = lambda s: torch.randn(1 << 25, generator=torch.Generator().manual_seed(s))
    block = (0.02 * noise(0) + (0.002 * noise(seed) if seed else 0)).bfloat16().view(torch.uint8).numpy().tobytes()
    at, header = 0, {}
    for k, a, b in shapes:
        header[k], at = dict(dtype='BF16', shape=[a, b], data_offsets=[at, at + 2 * a * b]), at + 2 * a * b
    text = json.dumps(header).encode()
    (folder / name).mkdir(parents=True)
    with open(folder / name / 'model.safetensors', 'wb') as f:
        f.write(len(text).to_bytes(8, 'little') + text)
        for i, (_, a, b) in enumerate(shapes):
            left, start = 2 * a * b, i * 4096 % len(block)
            while left:
                left, start = left - f.write(block[start : start + left]), 0
    return at


def grow(size, count, folder):
    "One merge by TIES of `count` models, in a process of its own under the limit."
    import yaml

    c = question(
        'ties',
        [dict(model=str(folder / n), parameters=dict(weight=0.5, density=0.5)) for n in NAMES[: count - 1]],
        str(folder / 'base'),
    ) | {'dtype': 'bfloat16'}
    (folder / 'big.yml').write_text(yaml.safe_dump(c))
    found = process('limited', folder / 'big.yml', folder / 'out')
    shutil.rmtree(folder / 'out')
    return dict(big='ties', models=count, bytes_each=size, limit=LIMIT, **found)


def big():
    "Every size with four models, and every number of models at the middle size."
    from domains_worker import append, read
    from quiet import disturbed

    for size in SIZES:
        missing = [
            n
            for n in (COUNTS if size == SIZES[1] else COUNTS[-1:])
            if not any(
                (r.get('models'), r.get('bytes_each', 0) // 10**8) == (n, size // 10**8) for r in read(SPEED)['runs']
            )
        ]
        if not missing:
            continue
        with tempfile.TemporaryDirectory() as tmp:
            if shutil.disk_usage(tmp).free < 6 * size:
                raise OSError(f'{tmp} has less than {6 * size / 1e9:.0f} GB free')
            for seed, name in enumerate(('base', *NAMES)):
                synthetic(Path(tmp), size, name, seed)
            for count in missing:
                found, others = disturbed(lambda: grow(size, count, Path(tmp)))
                append([found | dict(others=round(others, 3))], SPEED, ('torch', 'numpy'))


if __name__ == '__main__':
    what, given = sys.argv[1], [Path(o) for o in sys.argv[2:]]
    start = time.perf_counter()
    if what == 'limited':
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    if what in ('ours', 'unhashed', 'limited', *TRIED):
        from ftbook.merging import engine

        if what in TRIED:
            TRIED[what]()
        start = time.perf_counter()
        engine.merge(given[0], given[1], hashes=what == 'ours')
    else:
        dict(parity=measure_parity, answer=answer, speed=speed, theirs=theirs, copy=copy, big=big, copies=copies)[what](
            *given
        )
    if what in (*SIDES, *TRIED, 'limited'):
        import resource

        print(
            round(sum(sum(resource.getrusage(o)[:2]) for o in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)), 3),
            round(time.perf_counter() - start, 3),
            peak(),
        )
