"""Codes, constants and values of 4-bit weights beside the kernels of bitsandbytes, on a GPU."""

import cuda
from cuda import MANY, settled
from instruments import hush

KEY = 'dtype', 'kind', 'shape'
PACKAGES = cuda.PACKAGES
PER_PROCESS, THREADS = MANY, 1
REPEATS = 5


def plan(runs):
    "A large matrix and one of SmolLM2-135M in every precision."
    for dtype in ('float32', 'bfloat16', 'float16'):
        for kind in ('nf4', 'fp4'):
            for shape in ([4096, 4096], [1536, 576]):
                yield dict(dtype=dtype, kind=kind, shape=shape)


def run(job):
    "How many bytes of codes differ, by how much constants and values do, and seconds of both."
    name = cuda.device()
    hush()
    return compared(**job) | dict(device=name)


def compared(dtype, kind, shape, on='cuda'):
    "Random weights, quantised by both."
    import torch
    import bitsandbytes.functional as B
    from ftbook.methods.nf4 import quantize_tensor

    torch.manual_seed(0)
    w = (torch.randn(shape) * 0.02).to(getattr(torch, dtype)).to(on)
    theirs, state = B.quantize_4bit(w, blocksize=64, compress_statistics=False, quant_type=kind)
    ours = quantize_tensor(w, kind, 64, double_quant=False)
    back = B.dequantize_4bit(theirs, state).float()
    again = ours.dequantize(w.dtype).float() if hasattr(ours, 'dequantize') else None
    ways = dict(
        ftbook=lambda: quantize_tensor(w, kind, 64, double_quant=True),
        bitsandbytes=lambda: B.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type=kind),
    )
    return dict(
        codes=int((ours.codes.flatten() != theirs.flatten()).sum()),
        bytes=theirs.numel(),
        constants=float((ours.absmax - state.absmax).abs().max()),
        values=None if again is None else float((again - back).abs().max()),
        seconds={name: mean_seconds(quantized) for name, quantized in ways.items()},
    )


def mean_seconds(action):
    "The mean of some repeats, after one that is not counted."
    action()
    start = settled()
    for _ in range(REPEATS):
        action()
    return (settled() - start) / REPEATS
