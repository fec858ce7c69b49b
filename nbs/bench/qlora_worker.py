"""One measured configuration of `qlora.ipynb`, in a process of its own.

    python qlora_worker.py DTYPE TOKENS THREADS ROUNDS      prints one line of JSON

Forward and backward of SmolLM2-135M in NF4 (blocks of 64, double quantisation), LoRA of rank 16 on all linear layers. All variants stand in one process, hold the same numbers and take turns:

    peft      PEFT's layers on bitsandbytes' `Linear4bit`
    ours      the layers of `ftbook.methods.lora` on `ftbook.methods.quant_layer.QuantLinear`, in the same model with the same loss
    finetune  what `ftbook.finetune` runs: these layers, the operators of `fast_` and the loss in chunks
    dense     the layers of `ftbook.methods.lora` on full-precision layers that hold the same (unpacked) weights
"""

import contextlib, json, logging, os, sys, time, warnings

os.environ.setdefault('HF_HUB_OFFLINE', '1')
warnings.filterwarnings('ignore')
logging.getLogger('bitsandbytes').setLevel('ERROR')
import torch
from torch import nn

from lora_step_worker import ALPHA, RANK, base, gap, step, tokens, weighed_step


def processor_seconds(model, loss):
    "Seconds of the processor for one step, all threads together: what others do on the machine is not in them."
    start = time.process_time()
    step(model, loss)
    return time.process_time() - start


def adapted(dtype):
    "Name -> model with LoRA, all with the same A and B, none of them where they start."
    import peft
    from ftbook.methods.lora_method import LoRA
    from ftbook.methods.quant import quantize_
    from ftbook.methods.quant_model import dequantize_

    lora = LoRA(rank=RANK, alpha=ALPHA)
    ours = {k: lora.apply(quantize_(base(dtype))) for k in ('ours', 'finetune')} | {
        'dense': lora.apply(dequantize_(quantize_(base(dtype))))
    }
    theirs = peft.get_peft_model(
        quantize_(base(dtype), backend='bitsandbytes'),
        peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules='all-linear'),
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name in ours['ours'].ftbook_added:
            p = ours['ours'].get_parameter(name)
            if name.endswith('lora_B'):
                nn.init.normal_(p, std=0.01)
            for k in ('finetune', 'dense'):
                ours[k].get_parameter(name).copy_(p)
            theirs.get_parameter(f'base_model.model.{name}.default.weight').copy_(p)
    return {k: m.train() for k, m in dict(peft=theirs, **ours).items()}


def variants(dtype, n, stack):
    "name -> (model, function that gives the mean loss of the n tokens)."
    from ftbook.data.examples import Example
    from ftbook.data.packs import pack
    from ftbook.training.objective import Objective
    from ftbook.training.batches import isolated

    models, ids = adapted(dtype), tokens(n)
    stack.enter_context(isolated(models['finetune'], fast=True))
    objective, row = (
        Objective(models['finetune']),
        pack([Example(ids[0].tolist(), [False] + [True] * (n - 1))])[0].to(ids.device),
    )
    return {k: (m, (lambda m=m: m(ids, labels=ids, use_cache=False).loss)) for k, m in models.items()} | dict(
        finetune=(models['finetune'], lambda: objective(row) / (n - 1))
    )


def main(dtype, n, threads, rounds):
    torch.set_num_threads(threads)
    with contextlib.ExitStack() as stack:
        runs = variants(dtype, n, stack)
        first = {k: weighed_step(*v) for k, v in runs.items()}  # warms up, is compared and weighed
        peft = first['peft']
        assert all(f[2].keys() == peft[2].keys() for f in first.values())
        same = {k: dict(loss=abs(f[1] - peft[1]), gradient=gap(f[2], peft[2])) for k, f in first.items() if k != 'peft'}
        scale, saved = max(float(g.abs().max()) for g in peft[2].values()), {k: f[3] for k, f in first.items()}
        first = peft = None
        times = [{k: processor_seconds(*v) for k, v in runs.items()} for _ in range(rounds)]
    return dict(
        dtype=dtype,
        tokens=n,
        threads=threads,
        seconds={k: [round(t[k], 4) for t in times] for k in runs},
        saved=saved,
        same=same,
        largest_gradient=scale,
    )


if __name__ == '__main__':
    print(json.dumps(main(sys.argv[1], *map(int, sys.argv[2:5]))))
