"""Merges as whole processes: the models, the configurations, and what a process took.

Three models that differ from SmolLM2-135M by noise, in bfloat16, lie in the cache of ftbook. `sides/merging.py` is
what a process runs.
"""

import os, shutil, subprocess, sys, time
from pathlib import Path

SIDE = Path(__file__).resolve().parent / 'sides' / 'merging.py'
NAMES = 'red', 'blue', 'green'
METHODS = {'ties': dict(density=0.5), 'dare_ties': dict(density=0.5), 'task_arithmetic': {}}
UNEQUAL = 'ties, unequal weights'
ROUNDS = 3


def question(method, models, base='base', **kw):
    "A configuration."
    return dict(merge_method=method, models=models, dtype='float32', **({'base_model': base} if base else {}), **kw)


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


def write_questions(folder):
    "The models, and one configuration for each method."
    import yaml

    big_models(folder)
    asked = {m: (m, (0.5, 0.5, 0.5)) for m in METHODS} | {UNEQUAL: ('ties', (0.5, 0.4, 0.3))}
    for name, (method, weights) in asked.items():
        models = [
            dict(model=str(folder / n), parameters=dict(weight=w, **METHODS[method])) for n, w in zip(NAMES, weights)
        ]
        c = question(method, models, str(folder / 'base')) | {'dtype': 'bfloat16'}
        (folder / f'{name}.yml').write_text(yaml.safe_dump(c))


def process(side, config, out):
    "One side's whole process: seconds, and the most memory that it held."
    from rivals import python_of

    python = python_of('mergekit') if side == 'theirs' else sys.executable
    shutil.rmtree(out, ignore_errors=True)
    # both sides may use every core
    free = {k: v for k, v in os.environ.items() if k not in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')}
    start = time.perf_counter()
    done = subprocess.run([python, SIDE, side, config, out], capture_output=True, text=True, env=free)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f'{side} {config}: {done.stderr[-2000:]}')
    cpu, inside, peak_kb = done.stdout.split()[-3:]
    return dict(seconds=round(seconds, 3), inside=float(inside), cpu=float(cpu), peak_mb=round(int(peak_kb) / 1024, 1))


def turn(method, sides):
    "Every side once, one after the other; what they write is gone afterwards."
    from ftbook.files import cache_dir

    folder = cache_dir() / 'merge_bench'
    write_questions(folder)
    found = {side: process(side, folder / f'{method}.yml', folder / f'{method} {side}') for side in sides}
    for side in sides:
        shutil.rmtree(folder / f'{method} {side}')
    return found
