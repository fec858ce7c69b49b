"""How fast `finetune` is on a CPU with one thread, with two, and with the number that the probe chooses: quiet, and beside a busy process.

The rule, written before the runs: three rounds, in which the six variants take turns; the median rate of the steps after the first
two is a run's answer; the probe is right where its mean rate is within a tenth of the better of one and two threads.

A run is a process of its own, since OMP_NUM_THREADS is read when PyTorch is imported.
"""

import json, os, subprocess, sys
from statistics import median

KEY = 'round', 'neighbours', 'threads'
PACKAGES = 'torch', 'transformers'
PER_PROCESS = 0  # a run starts a process itself, with the variables of its variant
ROUNDS, NEIGHBOURS, VARIANTS = 3, (0, 1), ('1', '2', 'probe')
ROWS, BATCH, SKIPPED = 96, 8, 2  # rows to train on, rows of a step, steps that only warm up
SPIN = 'while True: pass'


def plan(runs):
    "Rounds, in which the variants take turns."
    for n in range(ROUNDS):
        for busy in NEIGHBOURS:
            for threads in VARIANTS:
                yield dict(round=n, neighbours=busy, threads=threads)


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
        line = [sys.executable, __file__]
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


if __name__ == '__main__':
    print(json.dumps(train()))
