"""A step of LoRA and of DoRA beside PEFT: forward and backward of SmolLM2-135M on one row, adapters of rank 16 on all linear layers.

All variants are in one process and take turns, step by step; they hold the same numbers:

    peft      the model as transformers runs it, with PEFT's layers
    layers    the same model and loss, with the layers of `ftbook.methods.lora`
    finetune  what `ftbook.finetune` runs: the same layers, `fast_` and the loss in chunks
    frozen    the same model and loss without any adapter, only the gradient of the embeddings: nothing that has an adapter can do less
"""

import contextlib, os, time

from instruments import hush

os.environ.setdefault('HF_HUB_OFFLINE', '1')

KEY = 'method', 'dtype', 'tokens', 'threads'
PACKAGES = 'torch', 'transformers', 'peft'
ALONE = 0.05
PER_PROCESS = 1
THREADS = 2
RANK, ALPHA = 16, 32
TURNS = {256: 7, 1024: 3, 4096: 1}  # tokens -> steps of every variant in a run
ROUNDS = 2


def plan(runs):
    "Round by round, short rows first."
    for _ in range(ROUNDS):
        for n in TURNS:
            for dtype in ('float32', 'bfloat16'):
                for method in ('lora', 'dora'):
                    yield dict(method=method, dtype=dtype, tokens=n, threads=THREADS)


def run(job):
    "Seconds of every variant in every turn, bytes kept for the backward pass, and differences from PEFT."
    import torch

    hush()
    torch.set_num_threads(job['threads'])
    with contextlib.ExitStack() as stack:
        runs = variants(job['dtype'], job['tokens'], job['method'] == 'dora', stack)
        return in_turns(runs, TURNS[job['tokens']], lambda model, loss: step(model, loss)[0])


def in_turns(runs, turns, timed):
    "A first step that warms up, is compared and weighed; then the variants in turns, by the clock `timed`."
    first = {k: weighed_step(*v) for k, v in runs.items()}
    peft = first['peft']
    same = {
        k: dict(loss=abs(f[1] - peft[1]), gradient=gap(f[2], peft[2]))
        for k, f in first.items()
        if k not in ('peft', 'frozen')
    }
    scale = max(float(g.abs().max()) for g in peft[2].values())
    saved = {k: f[3] for k, f in first.items()}
    first = peft = None  # the gradients would be in the way
    times = [{k: timed(*v) for k, v in runs.items()} for _ in range(turns)]
    return dict(
        seconds={k: [round(t[k], 4) for t in times] for k in runs},
        saved=saved,
        same=same,
        largest_gradient=scale,
    )


# The variants


def base(dtype):
    "The model."
    from ftbook.models.load import load_model

    return load_model('smollm2-135m', dtype=dtype, device='cpu')[0]


def tokens(n):
    "n tokens of real text, one row."
    import torch
    from ftbook.data.corpora import load_corpus
    from ftbook.models.load import load_model

    _, tokenizer = load_model('smollm2-135m', device='cpu')
    text = ' '.join(r['text'] for r in load_corpus('movie')[:n])
    return torch.tensor([tokenizer(text).input_ids[:n]])


def same_numbers_(theirs, ours, *more):
    "Give PEFT's model and ours the same A, B and lengths, none of them where they start."
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for name in ours.ftbook_added:
            p = ours.get_parameter(name)
            if name.endswith('lora_B'):
                torch.nn.init.normal_(p, std=0.01)
            for model in more:
                model.get_parameter(name).copy_(p)
            theirs.get_parameter(f'base_model.model.{name}.default.weight').copy_(p)


def adapted(dtype, dora, base=base):
    "(PEFT's model, ours, ours again), with the same numbers."
    import peft
    from ftbook.methods.lora_method import LoRA

    theirs = peft.get_peft_model(
        base(dtype), peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules='all-linear', use_dora=dora)
    )
    ours = [LoRA(rank=RANK, alpha=ALPHA, use_dora=dora).apply(base(dtype)) for _ in range(2)]
    same_numbers_(theirs, *ours)
    return theirs, *ours


def as_finetune(model, ids, stack):
    "The mean loss of a row as `finetune` computes it, until the stack closes."
    from ftbook.data.examples import Example
    from ftbook.data.packs import pack
    from ftbook.training.batches import isolated
    from ftbook.training.objective import Objective

    n = ids.shape[1]
    stack.enter_context(isolated(model, fast=True))
    objective = Objective(model)
    row = pack([Example(ids[0].tolist(), [False] + [True] * (n - 1))])[0].to(ids.device)
    return lambda: objective(row) / (n - 1)


def variants(dtype, n, dora, stack, base=base, tokens=tokens):
    "name -> (model, function that gives the mean loss of the n tokens)."
    theirs, layers, whole = (m.train() for m in adapted(dtype, dora, base))
    ids = tokens(n)
    frozen = base(dtype).requires_grad_(False).train()
    embeddings = frozen.get_input_embeddings()(ids).detach().requires_grad_()
    plain = lambda m: lambda: m(ids, labels=ids, use_cache=False).loss
    return dict(
        peft=(theirs, plain(theirs)),
        layers=(layers, plain(layers)),
        finetune=(whole, as_finetune(whole, ids, stack)),
        frozen=(frozen, lambda: frozen(inputs_embeds=embeddings, labels=ids, use_cache=False).loss),
    )


# A step


def gradients(model):
    "Name -> gradient, PEFT's names as ours."
    return {
        n.removeprefix('base_model.model.').replace('.default.weight', ''): p.grad
        for n, p in model.named_parameters()
        if p.requires_grad and p.grad is not None
    }


def step(model, loss):
    "(seconds of forward and backward, loss, gradients)."
    start = time.perf_counter()
    value = loss()
    value.backward()
    seconds = time.perf_counter() - start
    found = gradients(model)
    model.zero_grad()
    return seconds, value.item(), found


def weighed_step(model, loss):
    """A step, and the bytes that its forward pass keeps for the backward pass: parameters not counted, and what is
    saved twice counted once."""
    import torch

    seen = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t):
        s = t.untyped_storage()
        if s.data_ptr() not in own:
            seen[s.data_ptr()] = s.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        found = step(model, loss)
    return *found, sum(seen.values())


def gap(a, b):
    "The largest difference of two sets of gradients, which have the same names."
    assert a.keys() == b.keys()
    return max(float((a[k].float() - b[k].float()).abs().max()) for k in a)
