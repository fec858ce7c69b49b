"""A training step beside transformers and TRL: speed, memory and loss on the same rows.

Every variant trains the same rows with the same LoRA configuration (rank 16, alpha 32, all linear layers), 8 rows to a step, AdamW at 1e-3:

    trainer          transformers' `Trainer` and PEFT, padded batches
    sft, sft_packed  TRL's `SFTTrainer`, plain, and packing to 1,024 tokens
    ftbook           `ftbook.finetune` with `ftbook.LoRA`, defaults
    bound            the matrix products of that step and nothing else
    rung0 .. rung6   the ladder from a plain loop to `finetune`, one idea at a time
"""

import contextlib, os, random, statistics, sys, time
from unittest import mock

from instruments import Memory, half

os.environ.setdefault('HF_HUB_OFFLINE', '1')

KEY = 'variant', 'dtype', 'threads'
PACKAGES = 'torch', 'transformers', 'peft', 'trl', 'accelerate'
ALONE = 0.05
PER_PROCESS = 1
THREADS = 2
ROUNDS = 3
VARIANTS = dict(
    bfloat16=['trainer', 'sft', 'sft_packed', 'ftbook', 'bound', *(f'rung{i}' for i in range(7))],
    float32=['trainer', 'sft_packed', 'ftbook', 'bound'],
)
RANK, ROWS, BATCH, LR = 16, 64, 8, 1e-3


def plan(runs):
    """Round by round, in the order of alternation. A CPU without instructions for bfloat16 only emulates it, and nobody
    should train that way: there, float32 alone."""
    for _ in range(ROUNDS):
        for dtype, variants in VARIANTS.items():
            for variant in variants:
                if dtype in ('float32', half()):
                    yield dict(variant=variant, dtype=dtype, threads=THREADS)


def run(job):
    "Tokens per second of every step, the highest memory above that of the weights, and losses."
    import torch
    from ftbook.data.encoding import encode
    from ftbook.models.load import load_model

    torch.set_num_threads(job['threads'])
    torch.manual_seed(0)
    model, tokenizer = load_model('smollm2-135m', dtype=job['dtype'], device='cpu', attention='sdpa')
    examples = encode(rows(), tokenizer)
    torch.randn(256, 256).mm(torch.randn(256, 256))  # wake the thread pool
    variant = way(job['variant'])
    seconds, tokens, losses, peak = variant(model, tokenizer, examples, getattr(torch, job['dtype']))
    rates = [n / s for n, s in zip(tokens, seconds)][1:]  # the first step warms up
    return dict(
        tokens_per_second=statistics.median(rates),
        rates=[round(r, 1) for r in rates],
        peak_bytes=peak,
        losses=[round(x, 6) for x in losses],
        seed=0,
    )


def way(variant):
    "The function that trains one variant: (seconds, tokens, losses of the steps, bytes)."
    if variant.startswith('rung'):
        return lambda *given: ladder(*given, rung=int(variant.removeprefix('rung')))
    return dict(
        trainer=trainer,
        sft=lambda *given: sft(*given, packing=False),
        sft_packed=lambda *given: sft(*given, packing=True),
        ftbook=ours,
        bound=bound,
    )[variant]


# The rows and the start


def rows():
    "64 explanations from the Jargon File, as TRL's prompt and completion."
    from ftbook.data.corpora import load_corpus, term_rows

    return random.Random(0).sample(term_rows(load_corpus('jargon')), ROWS)


def peft_config():
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules='all-linear', task_type='CAUSAL_LM')


def same_start_(model):
    "Give every LoRA A the same random start in every variant."
    import torch
    from zlib import crc32

    for name, p in model.named_parameters():
        if 'lora_A' not in name:
            continue
        where = name.split('.lora_A')[0].removeprefix('base_model.model.')
        generator = torch.Generator().manual_seed(crc32(where.encode()))
        p.data.copy_((torch.rand(p.shape, generator=generator) * 2 - 1) / p.shape[1] ** 0.5)
    return model


def batches(examples):
    return [examples[i : i + BATCH] for i in range(0, len(examples), BATCH)]


class Clock:
    "A transformers callback that notes when steps begin and end."

    def __new__(cls, sink):
        from transformers import TrainerCallback

        class Timer(TrainerCallback):
            def on_step_begin(self, *a, **k):
                self.t = time.perf_counter()

            def on_step_end(self, *a, **k):
                sink.append(time.perf_counter() - self.t)

        return Timer()


# The variants


def trainer(model, tokenizer, examples, dtype):
    "(a) transformers Trainer and peft, padded batches."
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments
    from ftbook.data.packs import pad

    args = TrainingArguments(
        output_dir='unused',
        per_device_train_batch_size=BATCH,
        learning_rate=LR,
        num_train_epochs=1,
        lr_scheduler_type='constant',
        save_strategy='no',
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        train_sampling_strategy='sequential',
        max_grad_norm=1.0,
        remove_unused_columns=False,
    )
    seconds, model = [], same_start_(get_peft_model(model, peft_config()))
    memory = Memory()
    t = Trainer(
        model=model,
        args=args,
        train_dataset=list(examples),
        data_collator=lambda es: pad(es, tokenizer.pad_token_id),
        callbacks=[Clock(seconds)],
    )
    with contextlib.redirect_stdout(sys.stderr):
        t.train()
    tokens = [sum(map(len, b)) for b in batches(examples)]
    return seconds, tokens, [h['loss'] for h in t.state.log_history if 'loss' in h], memory.stop()


def sft(model, tokenizer, examples, dtype, packing):
    "(b) TRL's SFTTrainer, plain or packing."
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokens = [sum(map(len, b)) for b in batches(examples)]
    size = (
        dict(per_device_train_batch_size=1, max_length=1024)
        if packing
        else dict(per_device_train_batch_size=BATCH, max_length=2048)
    )
    args = SFTConfig(
        output_dir='unused',
        learning_rate=LR,
        num_train_epochs=1,
        lr_scheduler_type='constant',
        save_strategy='no',
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        packing=packing,
        completion_only_loss=True,
        train_sampling_strategy='sequential',
        **size,
    )
    seconds = []
    memory = Memory()
    with contextlib.redirect_stdout(sys.stderr):
        t = SFTTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(rows()),
            processing_class=tokenizer,
            peft_config=peft_config(),
            callbacks=[Clock(seconds)],
        )
        same_start_(t.model)
        t.train()
    if packing:
        tokens = [sum(tokens) / len(seconds)] * len(seconds)  # packs differ a little; the sum is what counts
    return seconds, tokens, [h['loss'] for h in t.state.log_history if 'loss' in h], memory.stop()


def ladder(model, tokenizer, examples, dtype, rung):
    "(c) ours, and the steps of the ladder that leads there, in one plain loop."
    import torch
    from ftbook.data.isolate import isolate_
    from ftbook.data.packs import pack, pad
    from ftbook.methods.lora_method import LoRA
    from ftbook.training.objective import Objective
    from ftbook.training.fast import fast_

    if rung < 3:
        from peft import get_peft_model

        model = get_peft_model(model, peft_config()).base_model.model
    else:
        LoRA(rank=RANK, alpha=2 * RANK).apply(model)
    if rung > 0:
        isolate_(model)
    if rung > 3:
        fast_(model)
    if rung == 4:
        model.set_attn_implementation('ftbook_isolated')
    same_start_(model)
    objective = Objective(model.train())
    if rung < 2:
        objective.linear = False
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)
    memory, seconds, losses = Memory(), [], []
    for batch in batches(examples):
        start = time.perf_counter()
        n = sum(e.n_targets for e in batch)
        loss = (
            model(**pad(batch, tokenizer.pad_token_id)).loss
            if rung == 0
            else objective(pack(batch, share=rung > 5)[0]) / n
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return seconds, [sum(map(len, b)) for b in batches(examples)], losses, memory.stop()


def ours(model, tokenizer, examples, dtype):
    "(c) `finetune`, with its defaults and the order of the rivals."
    from ftbook.methods.lora_method import LoRA
    from ftbook.training.tune import finetune
    from ftbook.training import loop

    same_start_(LoRA(rank=RANK, alpha=2 * RANK).apply(model))
    memory = Memory()
    with mock.patch.object(loop, 'length_batches', lambda examples, batch_size, **k: batches(examples)):
        run = finetune(model, examples, lr=LR, batch_size=BATCH, schedule='constant', warmup=0, progress=False)
    return (
        [h['seconds'] for h in run.history],
        [h['tokens'] for h in run.history],
        [h['loss'] for h in run.history],
        memory.stop(),
    )


def bound(model, tokenizer, examples, dtype):
    """(d) the matrix products of the step and nothing else: frozen weights forward and to the input, LoRA, attention,
    head at the targets."""
    import torch

    c, r = model.config, RANK
    d, kv = c.hidden_size // c.num_attention_heads, c.num_key_value_heads
    g = c.num_attention_heads // kv
    shapes = [(m.in_features, m.out_features) for n, m in model.model.named_modules() if isinstance(m, torch.nn.Linear)]
    weights = [
        (torch.randn(o, i, dtype=dtype), torch.randn(r, i, dtype=dtype), torch.randn(o, r, dtype=dtype))
        for i, o in shapes
    ]
    head = model.lm_head.weight.detach()
    memory, seconds = Memory(), []
    for batch in batches(examples):
        T, N = sum(map(len, batch)), sum(e.n_targets for e in batch)
        x = {n: torch.randn(T, n, dtype=dtype) for n in {n for s in shapes for n in s}}
        u, h = torch.randn(T, r, dtype=dtype), torch.randn(N, c.hidden_size, dtype=dtype)
        heads = [
            (
                torch.randn(kv, g * len(e), d, dtype=dtype),
                torch.randn(kv, len(e), d, dtype=dtype),
                torch.randn(kv, g * len(e), len(e), dtype=dtype),
            )
            for e in batch
        ]
        start = time.perf_counter()
        for W, A, B in weights:
            o, i = W.shape
            x[i] @ W.t()
            x[i] @ A.t()
            u @ B.t()  # forward
            x[o] @ W
            x[o] @ B
            u @ A
            u.t() @ x[i]
            u.t() @ x[o]  # backward
        for _ in range(c.num_hidden_layers):
            for q, k, s in heads:
                q @ k.transpose(1, 2)
                s @ k  # forward
                q @ k.transpose(1, 2)
                q @ k.transpose(1, 2)
                s @ k
                s.transpose(1, 2) @ q
                s.transpose(1, 2) @ q
        for part in h.split(256):
            part @ head.t() @ head  # forward, and to the input
        seconds.append(time.perf_counter() - start)
    return seconds, [sum(map(len, b)) for b in batches(examples)], [], memory.stop()
