"""The threshold of a merge: what an exact one costs, and how often the engine's bracket is missed."""

import math, time

KEY = ('part',)
PACKAGES = 'torch', 'numpy'


def plan(runs):
    "The cost, then the misses."
    for part in ('selection', 'repeats'):
        yield dict(part=part)


def run(job):
    "One of the two."
    return dict(selection=selection, repeats=repeats)[job['part']]()


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
