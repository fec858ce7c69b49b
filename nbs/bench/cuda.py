"""What the studies on a GPU share. Their plans can be read anywhere; their runs need CUDA.

    for study in gpu_context gpu_nf4 gpu_steps gpu_agree gpu_memory gpu_fewshot_times gpu_fewshot
    do python -m nbs.bench run $study --go-on; done

Models have the shapes of public ones and random weights, but for the encoder of the few labels. A machine without a network is given
the packages that the rows and the encoder come from: the folder of ftbook's cache of a machine that has them, named in FTBOOK_CACHE.
"""

import gc, os, time

from ftbook.problem import Problem

os.environ.setdefault('HF_HUB_OFFLINE', '1')
PACKAGES = 'torch', 'transformers', 'peft', 'bitsandbytes', 'setfit', 'sentence-transformers', 'scikit-learn'
MANY = 100  # runs in one process, which pays once for the start of the device


def device():
    "The name of the GPU; Problem where there is none."
    import torch

    if not torch.cuda.is_available():
        raise Problem(
            'this study needs CUDA, and PyTorch finds no device', 'run it on a machine with a GPU', key='device'
        )
    return torch.cuda.get_device_name()


def settled():
    "Seconds by the clock, once the device has done all that it was given."
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def freed():
    "Give back what nothing uses any more."
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def random_model(shape, dtype, on='cuda', seed=0):
    "A model of a public shape, weights at random."
    import torch
    from ftbook.memory.configs import read_config
    from ftbook.models.load import as_dtype
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device(on):
        return AutoModelForCausalLM.from_config(read_config(shape), dtype=as_dtype(dtype))
