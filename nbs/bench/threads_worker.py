"""How fast `finetune` is on a CPU with one thread, with two, and with the number that the probe chooses, on a quiet machine
and beside one process that keeps a core busy.

    python threads_worker.py           make the runs that are missing
    python threads_worker.py plan      say which those are

A run is a process of its own, since OMP_NUM_THREADS is read when PyTorch is imported. The variants of a round take turns.
Results go to results/threads.json.
"""

import json, os, platform, subprocess, sys
from importlib.metadata import version
from pathlib import Path
from statistics import median

KEY = 'round', 'neighbours', 'threads'
PACKAGES = 'torch', 'transformers'
ROUNDS, NEIGHBOURS, THREADS = 3, (0, 1), ('1', '2', 'probe')
ROWS, BATCH, SKIPPED = 96, 8, 2  # rows to train on, rows of a step, steps that only warm up
RESULTS = Path(__file__).resolve().parent / 'results/threads.json'
SPIN = 'while True: pass'


def plan(runs):
    "The runs to make, in order."
    done = {tuple(r[k] for k in KEY) for r in runs}
    every = ((n, busy, threads) for n in range(ROUNDS) for busy in NEIGHBOURS for threads in THREADS)
    for job in every:
        if job not in done:
            yield dict(zip(KEY, job))


def environment(threads):
    "The variables of a run: a number of threads, or none where the probe is to choose."
    env = {k: v for k, v in os.environ.items() if k not in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')}
    return env if threads == 'probe' else env | dict(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads)


def run(job):
    "Train in a new process, beside the neighbours; tokens a second, threads and the reason for them."
    from ftbook.models.threads import sample_load

    others = sample_load(1.0)[0]
    busy = [subprocess.Popen([sys.executable, '-c', SPIN]) for _ in range(job['neighbours'])]
    try:
        line = [sys.executable, __file__, 'train']
        done = subprocess.run(line, env=environment(job['threads']), capture_output=True, text=True, check=True)
    finally:
        for o in busy:
            o.kill()
            o.wait()
    return json.loads(done.stdout.strip().split('\n')[-1]) | dict(others=round(others, 2))


def train():
    "LoRA on all linear layers of SmolLM2-135M, a dozen steps; the median rate of the steps."
    import ftbook as ft
    from ftbook.data.corpora import load_corpus

    model, tokenizer = ft.load_model('smollm2-135m', device='cpu')
    rows = [dict(text=r['text'], label='good' if r['rating'] > 0 else 'bad') for r in load_corpus('movie')]
    ft.LoRA(rank=16).apply(model)
    settings = dict(batch_size=BATCH, lr=1e-4, progress=False)
    found = ft.finetune(model, rows[:: len(rows) // ROWS][:ROWS], tokenizer=tokenizer, **settings)
    rates = [h['tokens'] / h['seconds'] for h in found.history[SKIPPED:]]
    return dict(used=found.threads, why=found.threads_why, rate=round(median(rates), 1), dtype=str(model.dtype)[6:])


def cpu_name():
    "What the processor calls itself."
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    return next((o.split(':')[1].strip() for o in lines if o.startswith('model name')), platform.processor())


def main():
    machine = dict(cpu=cpu_name(), cores=os.cpu_count(), versions={p: version(p) for p in PACKAGES})
    data = json.loads(RESULTS.read_text()) if RESULTS.exists() else dict(machines=[machine], runs=[])
    for job in list(plan(data['runs'])):
        if sys.argv[1:] == ['plan']:
            print(job)
            continue
        data['runs'].append(job | run(job) | dict(machine=0))
        RESULTS.write_text(json.dumps(data, indent=1) + '\n')
        print(data['runs'][-1], flush=True)


if __name__ == '__main__':
    print(json.dumps(train())) if sys.argv[1:] == ['train'] else main()
