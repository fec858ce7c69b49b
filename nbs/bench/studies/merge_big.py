"""Synthetic models of up to 3 GB, merged by TIES in a process that may hold half a gigabyte of data."""

import json, shutil, tempfile
from pathlib import Path

from harness import disturbed
from merges import NAMES, process, question
from sides.merging import LIMIT

KEY = 'models', 'bytes_each'
PACKAGES = 'torch', 'numpy'
SIZES = 750_000_000, 1_500_000_000, 3_000_000_000  # of one model
COUNTS = 2, 3, 4  # models, the base among them
ROWS, WIDTH, VOCABULARY = 4096, 4096, 32768  # the matrices, and the largest tensor: 268 MB


def plan(runs):
    "Every size with four models, and every number of models at the middle size."
    for size in SIZES:
        for count in COUNTS if size == SIZES[1] else COUNTS[-1:]:
            yield dict(models=count, bytes_each=size)


def run(job):
    "Make the models, and merge them; `others` is of the merge alone."
    count, size = job['models'], job['bytes_each']
    with tempfile.TemporaryDirectory() as tmp:
        if shutil.disk_usage(tmp).free < 6 * size:
            raise OSError(f'{tmp} has less than {6 * size / 1e9:.0f} GB free')
        for seed, name in enumerate(('base', *NAMES[: count - 1])):
            synthetic(Path(tmp), size, name, seed)
        found, others = disturbed(lambda: grow(count, Path(tmp)))
    return dict(method='ties', limit=LIMIT, **found, others=round(others, 3))


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


def grow(count, folder):
    "One merge by TIES of `count` models, in a process of its own under the limit."
    import yaml

    models = [dict(model=str(folder / n), parameters=dict(weight=0.5, density=0.5)) for n in NAMES[: count - 1]]
    c = question('ties', models, str(folder / 'base')) | {'dtype': 'bfloat16'}
    (folder / 'big.yml').write_text(yaml.safe_dump(c))
    return process('limited', folder / 'big.yml', folder / 'out')
