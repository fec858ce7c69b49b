"""PyTorch's attention in both precisions: milliseconds of 16 sentences in the shape of MiniLM's, there and back."""

import statistics, time

KEY = ('tokens',)
PACKAGES = ('torch',)
PER_PROCESS, THREADS = 5, 1
LENGTHS, ROUNDS = (16, 32, 64, 128, 256), 7


def plan(runs):
    "A run for each length of the sentences, in one process."
    for tokens in LENGTHS:
        yield dict(tokens=tokens)


def run(job):
    "Medians of runs that take turns, in processor time."
    import torch

    times = dict(bfloat16=[], float32=[])
    for _ in range(ROUNDS):
        for dtype in times:
            times[dtype].append(once(getattr(torch, dtype), job['tokens']))
    return {
        f'{dtype}_{way}': round(1000 * statistics.median(t[i] for t in found), 2)
        for dtype, found in times.items()
        for i, way in enumerate(('forward', 'backward'))
    }


def once(dtype, n):
    "(seconds there, seconds back)."
    import torch
    import torch.nn.functional as F

    q, k, v = (torch.randn(16, 12, n, 32, dtype=dtype, requires_grad=True) for _ in range(3))
    start = time.process_time()
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(16, 1, 1, n, dtype=dtype))
    there = time.process_time() - start
    out.backward(torch.ones_like(out))
    return there, time.process_time() - start - there
