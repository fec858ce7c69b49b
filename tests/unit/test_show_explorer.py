"Errors and private helpers of ftbook.show.explorer."

from fastcore.test import test_eq as check_eq, test_fail as check_fail
import math

from ftbook.show.bar_chart import bars
from ftbook.show.controls import Control, Controls
from ftbook.show.explorer import _input, explore


def test_an_explorer_names_wrong_controls_wrong_pictures_and_too_many_frames():
    def trained(rank, d_in, d_out):
        return rank * (d_in + d_out)

    shapes = {'576×192': (576, 192), '576×576': (576, 576), '576×1,536': (576, 1536)}

    def part(rank, shape):
        return trained(rank, *shape) / math.prod(shape)

    def share_by_rank(rank, layer):
        return {'LoRA': part(rank, shapes[layer]), 'full fine-tuning': 1.0}

    def draw_share(share):
        return bars(
            share, x_range=(0, 1), title='One layer of SmolLM2-135M', x_label='numbers trained, as a share of the layer'
        )

    check_fail(lambda: explore(share_by_rank, draw_share, rnk=[1]), contains='cannot be called with the controls rnk')
    check_fail(
        lambda: explore(share_by_rank, lambda v: v, rank=[1], layer=list(shapes)).picture,
        contains='draw should return a Picture, not dict',
    )
    check_fail(
        lambda: explore(share_by_rank, draw_share, rank=range(1, 999), layer=list(shapes)),
        contains="rank (998) x layer (3) = 2,994 frames, more than 2,000; thin 'rank'",
    )


def test_inputs_are_escaped_and_say_their_value():
    controls = Controls(rank=[1, 4, 16], layer=['q', 'gate'])
    check_eq(_input(Control(True, label='a & b')).count('checked'), 1)
    assert 'aria-valuetext="1"' in _input(controls.rank)
