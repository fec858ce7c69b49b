"""One measured configuration of `lora_step.ipynb`, in a process of its own.

    python lora_step_worker.py METHOD DTYPE TOKENS THREADS ROUNDS      prints one line of JSON

METHOD is 'lora' or 'dora': rank 16, alpha 32, on all linear layers of SmolLM2-135M. All variants stand in one process and take turns, step by step; they hold the same numbers.

    peft      the model as transformers runs it, with PEFT's layers
    layers    the same model and loss, with the layers of `ftbook.methods.lora`
    finetune  what `ftbook.finetune` runs: the same layers, `fast_` and the loss in chunks
    frozen    the same model and loss without any adapter, only the gradient of the embeddings: nothing that has an adapter can do less
"""

import contextlib, json, logging, os, statistics, sys, time, warnings

os.environ.setdefault('HF_HUB_OFFLINE', '1')
warnings.filterwarnings('ignore')
logging.getLogger('bitsandbytes').setLevel('ERROR')
import torch
from torch import nn

RANK, ALPHA = 16, 32


def base(dtype):
    from ftbook.models.load import load_model

    return load_model('smollm2-135m', dtype=dtype, device='cpu')[0]


def tokens(n):
    "n tokens of real text, one row."
    from ftbook.data.corpora import load_corpus
    from ftbook.models.load import load_model

    _, tokenizer = load_model('smollm2-135m', device='cpu')
    text = ' '.join(r['text'] for r in load_corpus('movie')[:n])
    return torch.tensor([tokenizer(text).input_ids[:n]])


def adapted(dtype, dora):
    "(PEFT's model, ours, ours again), with the same A, B and lengths, none of them where they start."
    import peft
    from ftbook.methods.lora_method import LoRA

    theirs = peft.get_peft_model(
        base(dtype), peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules='all-linear', use_dora=dora)
    )
    ours = [LoRA(rank=RANK, alpha=ALPHA, use_dora=dora).apply(base(dtype)) for _ in range(2)]
    torch.manual_seed(0)
    with torch.no_grad():
        for name in ours[0].ftbook_added:
            p = ours[0].get_parameter(name)
            if name.endswith('lora_B'):
                nn.init.normal_(p, std=0.01)
            ours[1].get_parameter(name).copy_(p)
            theirs.get_parameter(f'base_model.model.{name}.default.weight').copy_(p)
    return theirs, *ours


def variants(dtype, n, dora, stack):
    "name -> (model, function that gives the mean loss of the n tokens)."
    from ftbook.data.examples import Example
    from ftbook.data.packs import pack
    from ftbook.training.objective import Objective
    from ftbook.training.batches import isolated

    theirs, layers, whole = (m.train() for m in adapted(dtype, dora))
    ids, frozen = tokens(n), base(dtype).requires_grad_(False).train()
    embeddings = frozen.get_input_embeddings()(ids).detach().requires_grad_()
    stack.enter_context(isolated(whole, fast=True))
    objective, row = Objective(whole), pack([Example(ids[0].tolist(), [False] + [True] * (n - 1))])[0].to(ids.device)
    plain = lambda m: lambda: m(ids, labels=ids, use_cache=False).loss
    return dict(
        peft=(theirs, plain(theirs)),
        layers=(layers, plain(layers)),
        finetune=(whole, lambda: objective(row) / (n - 1)),
        frozen=(frozen, lambda: frozen(inputs_embeds=embeddings, labels=ids, use_cache=False).loss),
    )


def step(model, loss):
    "(seconds of forward and backward, loss, gradients)."
    start = time.perf_counter()
    value = loss()
    value.backward()
    seconds = time.perf_counter() - start
    grads = {
        n.removeprefix('base_model.model.').replace('.default.weight', ''): p.grad
        for n, p in model.named_parameters()
        if p.requires_grad and p.grad is not None
    }
    model.zero_grad()
    return seconds, value.item(), grads


def weighed_step(model, loss):
    """A step, and the bytes that its forward pass keeps for the backward pass: parameters not counted, and what is
    saved twice counted once."""
    seen, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t):
        s = t.untyped_storage()
        if s.data_ptr() not in own:
            seen[s.data_ptr()] = s.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        found = step(model, loss)
    return *found, sum(seen.values())


def gap(a, b):
    return max(float((a[k].float() - b[k].float()).abs().max()) for k in a)


def main(method, dtype, n, threads, rounds):
    torch.set_num_threads(threads)
    with contextlib.ExitStack() as stack:
        runs = variants(dtype, n, method == 'dora', stack)
        first = {k: weighed_step(*v) for k, v in runs.items()}  # warms up, is compared and weighed
        peft = first['peft']
        assert first['layers'][2].keys() == first['finetune'][2].keys() == peft[2].keys()
        same = {
            k: dict(loss=abs(first[k][1] - peft[1]), gradient=gap(first[k][2], peft[2])) for k in ('layers', 'finetune')
        }
        scale = max(float(g.abs().max()) for g in peft[2].values())
        saved, first, peft = {k: f[3] for k, f in first.items()}, None, None
        times = [{k: step(*v)[0] for k, v in runs.items()} for _ in range(rounds)]
    return dict(
        method=method,
        dtype=dtype,
        tokens=n,
        threads=threads,
        seconds={k: [round(t[k], 4) for t in times] for k in runs},
        saved=saved,
        same=same,
        largest_gradient=scale,
    )


if __name__ == '__main__':
    method, dtype, n, threads, rounds = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
    print(json.dumps(main(method, dtype, n, threads, rounds)))
