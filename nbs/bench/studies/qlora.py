"""A step of QLoRA beside PEFT on bitsandbytes: SmolLM2-135M in NF4 (blocks of 64, double quantisation), LoRA of rank 16 on all linear layers.

All variants are in one process, hold the same numbers and take turns:

    peft      PEFT's layers on bitsandbytes' `Linear4bit`
    ours      the layers of `ftbook.methods.lora` on `ftbook.methods.quant_layer.QuantLinear`, in the same model with the same loss
    finetune  what `ftbook.finetune` runs: these layers, the operators of `fast_` and the loss in chunks
    dense     the layers of `ftbook.methods.lora` on full-precision layers that hold the same (unpacked) weights

Seconds are the processor's, all threads together: what others do on the machine is not in them.
"""

import contextlib, time

from instruments import hush
from studies.lora_step import ALPHA, RANK, as_finetune, base, in_turns, same_numbers_, step, tokens

KEY = 'dtype', 'tokens', 'threads'
PACKAGES = 'torch', 'transformers', 'peft', 'bitsandbytes'
PER_PROCESS = 1
THREADS = 1
TURNS = {256: 3}  # tokens -> steps of every variant in a run


def plan(runs):
    for n in TURNS:
        for dtype in ('float32', 'bfloat16'):
            yield dict(dtype=dtype, tokens=n, threads=THREADS)


def run(job):
    "Processor seconds of every variant in every turn, bytes kept for the backward pass, and differences from PEFT."
    import torch

    hush()
    torch.set_num_threads(job['threads'])
    with contextlib.ExitStack() as stack:
        return in_turns(variants(job['dtype'], job['tokens'], stack), TURNS[job['tokens']], processor_seconds)


def processor_seconds(model, loss):
    "Seconds of the processor for one step."
    start = time.process_time()
    step(model, loss)
    return time.process_time() - start


def adapted(dtype, base=base):
    "Name -> model with LoRA, all with the same A and B, none of them where they start."
    import peft
    from ftbook.methods.lora_method import LoRA
    from ftbook.methods.quant import quantize_
    from ftbook.methods.quant_model import dequantize_

    lora = LoRA(rank=RANK, alpha=ALPHA)
    ours = {k: lora.apply(quantize_(base(dtype))) for k in ('ours', 'finetune')}
    ours['dense'] = lora.apply(dequantize_(quantize_(base(dtype))))
    theirs = peft.get_peft_model(
        quantize_(base(dtype), backend='bitsandbytes'),
        peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules='all-linear'),
    )
    same_numbers_(theirs, *ours.values())
    return {k: m.train() for k, m in dict(peft=theirs, **ours).items()}


def variants(dtype, n, stack, base=base, tokens=tokens):
    "name -> (model, function that gives the mean loss of the n tokens)."
    models = adapted(dtype, base)
    ids = tokens(n)
    plain = {k: (m, (lambda m=m: m(ids, labels=ids, use_cache=False).loss)) for k, m in models.items()}
    return plain | dict(finetune=(models['finetune'], as_finetune(models['finetune'], ids, stack)))
