"Explorers and charts to look at."

import math

from ftbook.show.bar_chart import bars
from ftbook.show.charts import Frame, plot
from ftbook.show.controls import Control
from ftbook.show.explorer import explore
from ftbook.show.stacks import stacked_bars


def trained(rank, kind, bias):
    return {'trained': rank * {'square': 1152, 'wide': 2112}[kind] + 576 * bias, 'all': 331776}


def two_kinds():
    return explore(
        trained,
        lambda v: bars(v, x_range=(0, 4e5)),
        rank=[1, 4, 16, 64],
        kind=Control(['square', 'wide'], value='wide'),
        bias=False,
    )


# ---- charts: legible at any width, in light and in dark

LONG = 'transformers Trainer with peft, padded batches'


def gallery():
    ranks, xs = [2**k for k in range(10)], list(range(1, 400))
    return dict(
        logs=plot(
            {
                n: (ranks, [r * c for r in ranks])
                for n, c in (('576×192', 3e-3), ('576×576', 2e-3), ('576×1,536', 1.9e-3))
            },
            x_label='rank',
            y_label='share',
            title='A title',
            marks={'rank 16': 16, 'breaks even at': 288, 'and here is another': 300},
            frame=Frame(log_x=True, log_y=True),
        ),
        band=plot(
            {'mean': (xs, [1 / x for x in xs])},
            {'each': (xs, [1.1 / x for x in xs])},
            {'mean': (xs, [0.8 / x for x in xs], [1.2 / x for x in xs])},
            x_label='step',
        ),
        many=plot(
            {f'method number {i}': ([0, 1], [i, i * 2]) for i in range(9)},
            title='A long title that has to wrap on a narrow page, and does',
        ),
        near=plot({c: ([0, 1], [0, 1 + i / 1e3]) for i, c in enumerate('abcdef')}, frame=Frame(height=240)),
        lrs=plot({'accuracy': ([1e-5, 1e-4, 1e-3], [0.6, 0.7, 0.9])}, frame=Frame(log_x=True, height=240)),
        big=plot({'': ([0, 4e9], [-5e6, 5e6])}),
        flat=plot({'': ([1, 2], [3, 3])}),
        small=plot({'': ([0, 3e-5], [0, 2e-7])}),
        bars=bars(
            {'before': 0.628, 'after': 0.892},
            errors={'before': 0.04, 'after': (0.86, 0.917)},
            marks={'majority class': 0.53},
        ),
        groups=bars(
            {'q, o': {'all': 663552, 'LoRA': 36864}, 'gate, up, down': {'all': 2654208, 'LoRA': 101376}}, title='Groups'
        ),
        long=bars({LONG: 224, 'ftbook': 421.4, 'broken': math.nan}),
        signs=bars({'forgotten': -3.2, 'gained': 12.5, 'equal': 0}, errors={'forgotten': 0.8}),
        stacks=stacked_bars(
            {'LLaMA-7B, LoRA': {'weights': 12.6, 'activations': 3.1}, LONG: {'weights': 2.5, 'AdamW': 10.1}},
            unit='GiB',
            title='Peak of a step',
            marks={'8 GiB': 8, '16 GiB': 16, '80 GiB': 80},
        ),
    )
