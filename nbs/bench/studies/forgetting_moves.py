"""How far some of the runs on forgetting move the weights on the first task."""

import statistics

from studies.forgetting import RATES, SEQUENCES, VARIANTS, begun_with, learn, other_text

KEY = ('variant',)
PACKAGES = 'torch', 'transformers'
MOVED = *(f'{m} {lr:g}' for m, rates in RATES.items() for lr in rates), 'lora, rank 2', 'lora, rank 64'


def plan(runs):
    "Full fine-tuning and LoRA at every rate, and two other ranks."
    for variant in MOVED:
        yield dict(variant=variant)


def run(job):
    "How far the first task moves the matrices of the layers, and what other text pays: medians over the matrices."
    from ftbook.forgetting.moved import moved
    from ftbook.training.evaluate import evaluate

    way, texts = VARIANTS[job['variant']], sum(other_text()[0].values(), [])
    model, precision = begun_with(way, 0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()} if way['method'] == 'full' else None
    start = evaluate(model, texts).loss
    learn(way, model, SEQUENCES['domains'][0], 0, [], None, precision)
    found = [m for m in moved(model, before) if '.layers.' in m['name']]
    middle = {k: statistics.median(m[k] for m in found) for k in ('norm', 'share', 'rank')}
    middle['largest'] = statistics.median(m['norm'] / m['rank'] ** 0.5 for m in found)
    return dict(
        matrices=len(found),
        lost=round(evaluate(model, texts).loss - start, 5),
        **{k: round(v, 6) for k, v in middle.items()},
    )
