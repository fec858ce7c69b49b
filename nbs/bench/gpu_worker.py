"""What only a GPU can show: `python gpu_worker.py WHAT [...]`, every finished run appended to results/gpu_*.json.

    memory K N           the K-th of N shares of the configurations: the plan of `ftbook.memory` against PyTorch's allocator
    steps                forward and backward with LoRA: PEFT, our layers, `finetune`; on bitsandbytes too
    context              what a process holds on the device beside its tensors; nothing else may run there
    nf4                  codes, constants and values of NF4 against bitsandbytes' kernels
    agree                losses of `finetune` with and without its own operators, in every precision
    fewshot_times        SetFit and ours in turns, alone on the device
    fewshot SECONDS N    SetFit on the rows of `fewshot_worker.py`, in N processes, until the time is over
    tried SEED N         settings of ours, compared on draws SEED, SEED + 1 ... of the rows
    near SEED N          the same with settings around the default for 64 rows a class, on film reviews
    rows FILE            write the rows of these tasks to FILE, for a machine that cannot fetch them: FTBOOK_ROWS=FILE there

Models have the shapes of public ones and random weights, but for the encoder of `fewshot`.
"""

import contextlib, gc, json, os, statistics, subprocess, sys, tempfile, time, traceback, warnings
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
os.environ.setdefault('OMP_NUM_THREADS', '1')
warnings.filterwarnings('ignore')

HERE = Path(__file__).resolve().parent
DEVICE = os.environ.get('FTBOOK_DEVICE', 'cuda')  # 'cpu' tries the script out
PACKAGES = 'torch', 'transformers', 'peft', 'bitsandbytes', 'setfit', 'sentence-transformers', 'scikit-learn'


def keep(runs, name):
    "Append runs, with the name of the device."
    from importlib.util import find_spec
    import torch
    from domains_worker import append

    append(
        [r | dict(device=torch.cuda.get_device_name() if DEVICE == 'cuda' else 'cpu') for r in runs],
        HERE / 'results' / f'{name}.json',
        tuple(
            p
            for p in PACKAGES
            if find_spec(
                dict([('scikit-learn', 'sklearn'), ('sentence-transformers', 'sentence_transformers')]).get(p, p)
            )
        ),
    )


def each(jobs, do):
    "Do every job; one that fails says why and does not stop the others."
    for job in jobs:
        try:
            do(job)
        except Exception:
            print(job, traceback.format_exc()[-1500:], flush=True)


def settled():
    import torch

    if DEVICE == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter()


def random_model(shape, dtype, seed=0):
    "A model of a public shape, weights at random."
    import torch
    from transformers import AutoModelForCausalLM
    from ftbook.memory.configs import read_config
    from ftbook.models.load import as_dtype

    torch.manual_seed(seed)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(read_config(shape), dtype=as_dtype(dtype))


# Memory


def configurations():
    small, l1, l3, l8 = 'SmolLM2-135M', 'Llama-3.2-1B', 'Llama-3.2-3B', 'Llama-3.1-8B'
    lora = dict(method='lora', dtype='bfloat16')
    yield from (
        dict(model=small, tokens=n, **c)
        for n in (512, 2048)
        for c in (
            {},
            dict(checkpointing=True),
            dict(precision='bf16'),
            dict(precision='fp16'),
            lora,
            dict(lora, checkpointing=True),
        )
    )
    yield from (
        dict(model=small, tokens=512, rows=4, optimizer=o) for o in ('sgd', 'adafactor', 'adamw8bit', 'bitsandbytes')
    )
    yield from (
        dict(model=small, tokens=512, method=m, dtype='bfloat16')
        for m in ('qlora', 'bottleneck', 'prompt', 'prefix', 'ia3', 'bitfit', 'dora')
    )
    yield from (
        dict(model=l1, tokens=n, **c)
        for n in (512, 2048)
        for c in (
            dict(checkpointing=True),
            dict(precision='bf16', checkpointing=True),
            dict(precision='bf16', optimizer='adafactor'),
            lora,
            dict(lora, method='qlora', checkpointing=True),
        )
    )
    yield from (
        dict(model=l3, tokens=2048, checkpointing=True, **c)
        for c in (dict(precision='bf16', optimizer='adamw8bit'), lora, dict(lora, method='qlora'))
    )
    yield from (
        dict(model=l8, tokens=n, rows=r, checkpointing=c, **lora)
        for n, r, c in ((512, 1, False), (2048, 1, True), (2048, 4, True), (8192, 1, True))
    )
    yield from (dict(model=l8, tokens=n, checkpointing=True, **dict(lora, method='qlora')) for n in (512, 2048))


def memory(share, shares):
    import torch
    import memory_worker as m
    from ftbook.memory.plan import CONTEXT, plan

    def one(c):
        c = m.DEFAULT | c
        method, quantize = m.method_of(c['method'])
        told, real = m.optimizer_of(c['optimizer'])
        p = plan(
            c['model'],
            method,
            quantize=quantize,
            dtype=c['dtype'],
            seq_len=c['tokens'],
            batch_size=c['rows'],
            optimizer=told,
            **m.MIXED[c['precision']],
            gradient_checkpointing=c['checkpointing'],
            device=DEVICE,
        )
        left = torch.cuda.memory_allocated()  # what the configuration before left behind in this process
        model = random_model(c['model'], c['dtype'])
        if quantize:
            model = quantize(model) or model
        if method:
            model = method.apply(model)
        run, losses = m.by_finetune(model, c, real)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        keep(
            [
                c
                | dict(
                    planned=p.peak,
                    context=CONTEXT,
                    measured=torch.cuda.max_memory_allocated() - left,
                    reserved=torch.cuda.max_memory_reserved(),
                    before=before - left,
                    left=left,
                    items=p.groups(),
                    losses=[round(l, 4) for l, _ in losses],
                )
            ],
            'gpu_memory',
        )
        print(
            c['model'],
            c['method'],
            c['tokens'],
            c['precision'],
            c['optimizer'],
            c['checkpointing'],
            f'{(p.peak - CONTEXT) / (torch.cuda.max_memory_allocated() - left) - 1:+.2%}',
            flush=True,
        )

    def alone(c):
        try:
            one(c)
        finally:
            gc.collect()
            torch.cuda.empty_cache()

    each(list(configurations())[share::shares], alone)


def context():
    import torch

    a = torch.randn(1024, 1024, device='cuda', dtype=torch.bfloat16, requires_grad=True)
    (a @ a).sum().backward()
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    keep(
        [
            dict(
                context=total - free - torch.cuda.memory_reserved(),
                reserved=torch.cuda.memory_reserved(),
                allocated=torch.cuda.memory_allocated(),
                total=total,
            )
        ],
        'gpu_context',
    )


# Steps


def steps(rounds=8, only=''):
    import torch
    import lora_step_worker, qlora_worker

    shape = None
    lora_step_worker.base = qlora_worker.base = lambda dtype: random_model(shape, dtype)
    lora_step_worker.tokens = qlora_worker.tokens = lambda n: torch.randint(
        3, 30_000, (1, n), generator=torch.Generator().manual_seed(0)
    ).to(DEVICE)

    def timed(model, loss):
        gc.collect()
        before = 0
        if DEVICE == 'cuda':
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = settled()
        value = loss()
        value.backward()
        seconds = settled() - start
        peak = torch.cuda.max_memory_allocated() - before if DEVICE == 'cuda' else 0
        grads = {
            n.removeprefix('base_model.model.').replace('.default.weight', ''): p.grad
            for n, p in model.named_parameters()
            if p.requires_grad and p.grad is not None
        }
        model.zero_grad()
        return seconds, value.item(), grads, peak

    def compared(kind, dtype, n):
        with contextlib.ExitStack() as stack:
            runs = (qlora_worker if kind == 'qlora' else lora_step_worker).variants(
                dtype, n, *(() if kind == 'qlora' else (kind == 'dora',)), stack
            )
            first = {k: timed(*v) for k, v in runs.items()}
            peft = first['peft']
            same = {
                k: dict(loss=abs(f[1] - peft[1]), gradient=lora_step_worker.gap(f[2], peft[2]))
                for k, f in first.items()
                if f[2].keys() == peft[2].keys() and k != 'peft'
            }
            scale, first, peft = max(float(g.abs().max()) for g in peft[2].values()), None, None
            for v in runs.values():
                timed(*v)
            found = [{k: timed(*v) for k, v in runs.items()} for _ in range(rounds)]
            keep(
                [
                    dict(
                        kind=kind,
                        model=shape,
                        dtype=dtype,
                        tokens=n,
                        seconds={k: [round(f[k][0], 5) for f in found] for k in runs},
                        above={k: found[-1][k][3] for k in runs},
                        same=same,
                        largest_gradient=scale,
                    )
                ],
                'gpu_steps',
            )
            print(
                kind,
                shape,
                dtype,
                n,
                {k: round(statistics.median(f[k][0] for f in found) * 1000, 1) for k in runs},
                same,
                scale,
                flush=True,
            )

    def one(job):
        nonlocal shape
        shape = job[1]
        try:
            compared(job[0], *job[2:])
        finally:
            gc.collect()
            if DEVICE == 'cuda':
                torch.cuda.empty_cache()

    each(
        [
            ('lora', 'SmolLM2-135M', 'float32', 512),
            ('lora', 'SmolLM2-135M', 'bfloat16', 2048),
            ('qlora', 'SmolLM2-135M', 'bfloat16', 2048),
            ('lora', 'Llama-3.2-1B', 'bfloat16', 2048),
            ('qlora', 'Llama-3.2-1B', 'bfloat16', 2048),
            ('dora', 'Llama-3.2-1B', 'bfloat16', 2048),
        ][1 if only else 0 :: 2 if only else 1]
        if DEVICE == 'cuda'
        else [(k, 'SmolLM2-135M', 'bfloat16', 32) for k in ('lora', 'qlora')],
        one,
    )


# NF4


def nf4():
    import torch
    import bitsandbytes.functional as B
    from ftbook.methods.nf4 import quantize_tensor

    def one(job):
        dtype, kind, shape = job
        torch.manual_seed(0)
        w = (torch.randn(shape) * 0.02).to(getattr(torch, dtype)).to(DEVICE)
        theirs, state = B.quantize_4bit(w, blocksize=64, compress_statistics=False, quant_type=kind)
        ours = quantize_tensor(w, kind, 64, double_quant=False)
        back = B.dequantize_4bit(theirs, state).float()
        again = ours.dequantize(w.dtype).float() if hasattr(ours, 'dequantize') else None
        times = {}
        for name, f in dict(
            ftbook=lambda: quantize_tensor(w, kind, 64, double_quant=True),
            bitsandbytes=lambda: B.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type=kind),
        ).items():
            f()
            start = settled()
            for _ in range(5):
                f()
            times[name] = (settled() - start) / 5
        keep(
            [
                dict(
                    dtype=dtype,
                    kind=kind,
                    shape=shape,
                    codes=int((ours.codes.flatten() != theirs.flatten()).sum()),
                    bytes=theirs.numel(),
                    constants=float((ours.absmax - state.absmax).abs().max()),
                    values=None if again is None else float((again - back).abs().max()),
                    seconds=times,
                )
            ],
            'gpu_nf4',
        )
        print(job, int((ours.codes.flatten() != theirs.flatten()).sum()), times, flush=True)

    each(
        [
            (d, k, s)
            for d in ('float32', 'bfloat16', 'float16')
            for k in ('nf4', 'fp4')
            for s in ((4096, 4096), (1536, 576))
        ],
        one,
    )


# Losses


def agree(n_steps=8, n_jobs=12):
    import random
    import torch
    from memory_worker import MIXED
    from ftbook.data.examples import Example
    from ftbook.training.tune import finetune

    rng = random.Random(0)
    rows = [
        Example(
            ids := [rng.randrange(3, 40_000) for _ in range(rng.randrange(40, 400))],
            [False] + [True] * (len(ids) - 1),
            index=i,
        )
        for i in range(64)
    ]

    def one(job):
        dtype, precision, checkpointing, fast, most = job
        model = random_model('SmolLM2-135M', dtype)
        start = settled()
        h = finetune(
            model,
            rows,
            max_steps=n_steps if DEVICE == 'cuda' else 1,
            batch_size=8,
            max_tokens=most,
            lr=3e-4,
            **MIXED[precision],
            gradient_checkpointing=checkpointing,
            fast=fast,
            progress=False,
        ).history
        keep(
            [
                dict(
                    dtype=dtype,
                    precision=precision,
                    checkpointing=checkpointing,
                    fast=fast,
                    max_tokens=most,
                    losses=[round(x['loss'], 5) for x in h],
                    seconds=[round(x['seconds'], 4) for x in h],
                )
            ],
            'gpu_agree',
        )
        print(job, [round(x['loss'], 4) for x in h], f'{settled() - start:.1f} s', flush=True)

    each(
        [
            (d, p, c, f, m)
            for d, p, c, m in (
                ('float32', 'bf16', False, 8192),
                ('float32', None, False, 8192),
                ('float32', None, False, 800),
                ('float32', 'fp16', False, 8192),
                ('float32', 'bf16', True, 8192),
            )
            for f in (True, False)
        ][:n_jobs],
        one,
    )
    from ftbook.memory.measure import measure_peak
    from ftbook.memory.tricks import offload_activations

    if DEVICE != 'cuda':
        return
    on_gpu = random_model('SmolLM2-135M', 'float32')

    def forward():
        return on_gpu(torch.zeros(1, 1024, dtype=torch.int64, device='cuda'), use_cache=False).logits

    kept = measure_peak(forward, 'cuda').peak
    with offload_activations():
        less = measure_peak(forward, 'cuda').peak
    keep([dict(offload=dict(kept=kept, offloaded=less))], 'gpu_agree')


# Few labels

TRIED = dict(
    upper=dict(),
    whole=dict(layers=0, lr=1e-4, steps=12),
    whole_15=dict(layers=0, lr=1e-4),
    whole_25=dict(layers=0, lr=1e-4, least=25),
    whole_slow=dict(layers=0, lr=5e-5, least=25),
    whole_fast=dict(layers=0, lr=2e-4, steps=12),
    whole_twice=dict(layers=0, lr=1e-4, turns=6),
    upper_25=dict(least=25),
    contrastive=dict(layers=0, lr=1e-4, loss='contrastive'),
    upper_contrastive=dict(loss='contrastive'),
    contrastive_12=dict(layers=0, lr=1.5e-4, least=12, loss='contrastive'),
    four=dict(layers=4, lr=1.5e-4, loss='contrastive'),
    whole_40=dict(layers=0, lr=1e-4, least=40),
    contrastive_40=dict(layers=0, lr=1e-4, least=40, loss='contrastive'),
    contrastive_25=dict(layers=0, lr=1e-4, least=25, loss='contrastive'),
    contrastive_80=dict(layers=0, lr=1e-4, least=80, loss='contrastive'),
    whole_80=dict(layers=0, lr=1e-4, least=80),
)
NEAR = {
    'contrastive_40': {},
    'half the rate': dict(lr=5e-5),
    'twice the rate': dict(lr=2e-4),
    'temperature .05': dict(temperature=0.05),
    'temperature .2': dict(temperature=0.2),
    'temperature .4': dict(temperature=0.4),
    'contrastive_28': dict(least=28),
    'contrastive_80': dict(least=80),
    'whole_40': dict(loss='similarity'),
}
# around what is the default for 64 rows a class
TRIED |= {n: TRIED['contrastive_40'] | how for n, how in NEAR.items()}
OTHER = 'others'  # the newsgroups that are no task of the bench


def rows_file(path):
    import gzip
    import fewshot_worker as w

    rows = {t: w.rows_of(t) for t in w.TASKS}
    rows[OTHER] = [r for r in w.rows_of(w.MANY) if r['label'] not in w.eight()]
    with gzip.open(path, 'wt') as f:
        json.dump(
            {t: [{k: r[k] for k in ('text', 'label', 'id') if k in r} for r in found] for t, found in rows.items()}, f
        )


def use_rows():
    import gzip
    import fewshot_worker as w

    if path := os.environ.get('FTBOOK_ROWS'):
        with gzip.open(path, 'rt') as f:
            rows = json.load(f)
        w.rows_of = rows.__getitem__
    return w


def tuned(w, name, task, shots, seed):
    "Ours with other settings."
    import math
    from ftbook.fewshot.classifier import FewShotClassifier
    from ftbook.fewshot.tuning import Tuning

    train, test = w.split(task, shots, seed)
    (texts, labels), (test_texts, truth) = w.columns(train), w.columns(test)
    how = dict(TRIED[name]) if name != 'frozen' else None
    if how is not None and ({'least', 'turns'} & how.keys()):
        how['steps'] = max(how.pop('least', 15), math.ceil(how.pop('turns', 3) * len(texts) / 40))
    model = FewShotClassifier(device=DEVICE, tuning=None if how is None else Tuning(seed=seed, **how))
    start = settled()
    model.fit(texts, labels, check=False)
    seconds = settled() - start
    said = model.predict(test_texts)
    return dict(
        way='tried',
        tried=name,
        task=task,
        shots=shots,
        seed=seed,
        accuracy=round(sum(a == b for a, b in zip(said, truth)) / len(truth), 4),
        seconds=round(seconds, 3),
        test_rows=len(truth),
    )


def run_setfit(w, setfit, task, shots, seed):
    from ftbook.models.shipped import model_folder

    train, test = w.split(task, shots, seed)
    (texts, labels), (test_texts, truth) = w.columns(train), w.columns(test)
    found = setfit['run'](
        dict(
            texts=texts,
            labels=labels,
            test=test_texts,
            seed=seed,
            most=0,
            encoder=str(model_folder('minilm-l6')),
            out=tempfile.mkdtemp(),
            device=DEVICE,
        )
    )
    return dict(
        way='setfit',
        task=task,
        shots=shots,
        seed=seed,
        accuracy=round(sum(a == b for a, b in zip(found['said'], truth)) / len(truth), 4),
        seconds=round(found['seconds'], 3),
        test_rows=len(truth),
        steps=w.setfit_steps(task, shots),
    )


def jobs(w):
    "What is missing, of what a processor takes long for; then the rest."
    from domains_worker import read

    done = {(r['way'], r['task'], r['shots'], r['seed']) for r in read(HERE / 'results' / 'gpu_fewshot.json')['runs']}
    at8 = [('setfit', t, 8, s) for s in range(10) for t in w.TASKS]
    at16 = [('setfit', t, 16, s) for s in range(10) for t in ('groups', 'r8', 'news')]
    at64 = [('setfit', t, 64, s) for s in range(10) for t in w.TASKS if w.setfit_steps(t, 64) <= 1000]
    return [j for j in (*at64, *at16, *at8) if j not in done]


def few_process(until, folder):
    "Take jobs until the time is over."
    w, setfit = use_rows(), {}
    exec(w.SETFIT_RUN, setfit)
    import torch

    torch.set_num_threads(1)

    def one(job):
        if time.time() > until - 3:
            return
        try:
            os.close(os.open(f'{folder}/{"-".join(map(str, job))}', os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        keep([run_setfit(w, setfit, *job[1:])], 'gpu_fewshot')

    each(jobs(w), one)


def all_tried(w, jobs):
    from domains_worker import read

    done = {
        (r['tried'], r['task'], r['shots'], r['seed']) for r in read(HERE / 'results' / 'fewshot_tried.json')['runs']
    }
    each([j for j in jobs if j not in done], lambda j: keep([tuned(w, *j)], 'fewshot_tried'))


def tried(first, seeds):
    "Those of the settings that came first in a first look, seed by seed."
    w = use_rows()
    all_tried(
        w,
        [
            (n, t, k, s)
            for s in range(first, first + seeds)
            for k in (16, 8)
            for t in w.TASKS
            for n in ('upper', 'contrastive', 'contrastive_12', 'four')
        ],
    )


def near(first, seeds):
    all_tried(use_rows(), [(n, 'movie', 64, s) for s in range(first, first + seeds) for n in NEAR])


def fewshot_times():
    "SetFit and ours in turns, alone on the device."
    w, setfit = use_rows(), {}
    exec(w.SETFIT_RUN, setfit)

    def one(job):
        ours = tuned(w, 'upper', *job)
        theirs = run_setfit(w, setfit, *job)
        keep([dict(r, alone=True) for r in (ours, theirs)], 'gpu_fewshot_times')
        print(job, ours['seconds'], theirs['seconds'], flush=True)

    # the first warms up
    each([('news', 8, 200), *((t, 8, s) for s in (201, 202, 203) for t in ('news', 'movie', 'tweets'))], one)


def fewshot(seconds, n):
    until = time.time() + seconds
    folder = tempfile.mkdtemp()
    running = [
        subprocess.Popen(
            [sys.executable, __file__, 'few_process', str(until), folder],
            stdout=open(f'{folder}.{k}', 'w'),
            stderr=subprocess.STDOUT,
        )
        for k in range(n)
    ]
    for p in running:
        try:
            p.wait(max(1, until + 2 - time.time()))
        except subprocess.TimeoutExpired:
            p.kill()
    for k in range(n):
        print(*[line for line in Path(f'{folder}.{k}').read_text().splitlines() if 'Error' in line][-2:], flush=True)


if __name__ == '__main__':
    what, *args = sys.argv[1:] or ['']
    if what == 'rows':
        rows_file(args[0])
    elif what == 'few_process':
        few_process(float(args[0]), args[1])
    elif what in ('context', 'memory', 'steps', 'nf4', 'agree', 'tried', 'near', 'fewshot', 'fewshot_times'):
        globals()[what](*map(int, args))
    else:
        sys.exit(f'{what!r} is nothing that this measures.\n{__doc__}')
