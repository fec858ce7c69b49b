"""Bottleneck adapters against the `adapters` package: the same weights, the same adapter, the same batches.

Both sides get the same weights, the same adapter (written by `save_for_adapters`, read by the package) and the same
ten batches, and give logits, gradients, the weights after ten steps of AdamW and the logits after that. The package
saves what it has trained, and one more adapter with its own default configuration; `load_from_adapters` reads both.
"""

import json, tempfile
from functools import cache
from pathlib import Path

from sides.bottleneck import ARCHITECTURES, KINDS, LR, SIZE, STD, STEPS, batch, build, train

KEY = 'architecture', 'kind'
PACKAGES = 'torch', 'transformers', 'ftbook'
PER_PROCESS = len(ARCHITECTURES) * len(KINDS)
SIDE = Path(__file__).resolve().parent.parent / 'sides' / 'bottleneck.py'


def plan(runs):
    "Every kind of adapter in every architecture."
    for name in ARCHITECTURES:
        for kind in KINDS:
            yield dict(architecture=name, kind=kind)


def run(job):
    "The largest differences of one pair; the package answers all questions at once."
    return asked()[job['architecture'], job['kind']]


@cache
def asked():
    "Every pair's differences, by (architecture, kind)."
    return {(r['architecture'], r['kind']): r for r in ask()}


def ask():
    "Put every question to both sides: the runs."
    from rivals import ask as ask_rival

    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        models = {(name, kind): question(folder, name, kind) for name in ARCHITECTURES for kind in KINDS}
        ask_rival('adapters', str(SIDE), folder)
        rival = json.loads((folder / 'versions.json').read_text())
        return [compare(folder, *key, model) | dict(rival=rival) for key, model in models.items()]


def question(folder, name, kind):
    "Write the base, and a random adapter for it; return the model with the adapter on."
    import torch
    from ftbook.methods.bottleneck_method import Bottleneck
    from ftbook.methods.package_adapters import save_for_adapters
    from safetensors.torch import save_file

    model = build(name)
    save_file({k: t.clone().contiguous() for k, t in model.state_dict().items()}, folder / f'{name}.safetensors')
    Bottleneck(kind, SIZE, **KINDS[kind]).apply(model)
    torch.manual_seed(1)
    for n in model.ftbook_added:
        torch.nn.init.normal_(model.get_parameter(n), std=STD)
    save_for_adapters(model, folder / f'{name} {kind}' / 'ours')
    return model


def compare(folder, name, kind, model):
    "The largest differences between the two answers."
    import torch
    from ftbook.methods.bottleneck_method import bottlenecks
    from ftbook.methods.package_adapters import package_names
    from safetensors.torch import load_file

    here = folder / f'{name} {kind}'
    theirs = load_file(here / 'answer.safetensors')
    with torch.no_grad():
        base = build(name)(**batch(0)).logits
    names = package_names({n: o.place for n, o in bottlenecks(model).items()}, 'adapter')
    ours = train(model, {k: model.get_parameter(n) for n, k in names.items()}) | {'base': base}
    if ours.keys() != theirs.keys():
        raise ValueError(f'{name} {kind}: the package trains {sorted(theirs.keys() ^ ours.keys())[:3]}, or we do')
    gap = lambda start: max(float((ours[k] - theirs[k]).abs().max()) for k in ours if k.startswith(start))
    lost = here / 'lost.json'
    return dict(
        architecture=name,
        kind=kind,
        bottleneck_size=SIZE,
        **KINDS[kind],
        tensors=len(names),
        base=gap('base'),
        logits=gap('logits'),
        gradients=gap('gradient'),
        weights=gap('weight'),
        after=gap('after'),
        theirs_read=read_back(name, here / 'theirs', theirs['after']),
        native_read=read_back(name, here / 'native', load_file(here / 'native.safetensors')['logits']),
        head=(here / 'native' / 'model_head.safetensors').exists(),
        effect=float((ours['logits'] - base).abs().max()),
        smallest_gradient=min(float(t.abs().max()) for k, t in theirs.items() if k.startswith('gradient')),
        lost=json.loads(lost.read_text()) if lost.exists() else [],
        steps=STEPS,
        lr=LR,
        std=STD,
    )


def read_back(name, folder, wanted):
    "The largest difference of the logits with an adapter that the package has saved."
    import torch
    from ftbook.methods.package_adapters import load_from_adapters

    with torch.no_grad():
        return float((load_from_adapters(build(name), folder)(**batch(0)).logits - wanted).abs().max())
