"""What a process holds on a GPU beside its tensors. Nothing else may run there."""

import cuda

KEY = ()
PACKAGES = cuda.PACKAGES
PER_PROCESS = 1


def plan(runs):
    "Once."
    yield {}


def run(job):
    "Bytes after a product of two matrices and its gradient."
    import torch

    name = cuda.device()
    a = torch.randn(1024, 1024, device='cuda', dtype=torch.bfloat16, requires_grad=True)
    (a @ a).sum().backward()
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return dict(
        context=total - free - torch.cuda.memory_reserved(),
        reserved=torch.cuda.memory_reserved(),
        allocated=torch.cuda.memory_allocated(),
        total=total,
        device=name,
    )
