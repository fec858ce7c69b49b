"""Memory of a training step: the plan, made from a name or a configuration alone, and the peak that the profiler sees.

A causal model is trained for two steps by `finetune` itself, any other by the same two steps with the loss that transformers gives it.
"""

import contextlib, os, time

from instruments import hush

os.environ.setdefault('HF_HUB_OFFLINE', '1')

DEFAULT = dict(
    model='llama',
    method='full',
    tokens=512,
    rows=1,
    optimizer='adamw',
    dtype='float32',
    precision=None,
    checkpointing=False,
    attention=None,
    in_backward=False,
)
KEY = *DEFAULT, 'ladder'
PACKAGES = 'torch', 'transformers', 'bitsandbytes'
PER_PROCESS = 1
THREADS = 1

# Mixed precision in the words of the records -> in those of the library
MIXED = {
    None: {},
    'bf16': dict(precision='bfloat16', mixed=True),
    'fp16': dict(precision='float16', mixed=True),
}


def plan(runs):
    "The configurations, then the rungs of the ladder."
    for configuration in (*configurations(), *ladder()):
        yield DEFAULT | configuration


def run(job):
    "What the plan says, and what the profiler sees in two steps."
    import torch
    from ftbook.memory.measure import measure_peak

    hush()
    torch.set_num_threads(THREADS)
    method, quantize = method_of(job['method'])
    torch.manual_seed(0)
    told = optimizer_of(job['optimizer'], job['in_backward'])[0]
    start = time.perf_counter()
    p = planned(job, method, quantize, told)
    seconds = time.perf_counter() - start
    with contextlib.ExitStack() as stack:
        two_steps, losses, finetuned = ready(job, stack)
        m = measure_peak(two_steps)
    return dict(
        planned=p.peak,
        measured=m.peak,
        before=m.before,
        when=p.when,
        items=dict(p.groups()),
        plan_seconds=round(seconds, 2),
        finetune=finetuned,
        losses=[l for l, _ in losses],
        step_seconds=losses[-1][1],
    )


# What is measured


def configurations():
    "What is measured: each differs from DEFAULT in what it names."
    small = 'llama', 'gpt2', 'bert', 't5'
    yield from (dict(model=m, tokens=n) for m in small for n in (128, 1024))
    yield from (
        dict(model=m, tokens=n, checkpointing=True)
        for m, n in (('llama', 2048), ('llama', 4096), ('gpt2', 2048), ('bert', 1024), ('t5', 512))
    )
    yield from (
        dict(model=m, method=k, tokens=256, rows=2)
        for m in small
        for k in ('lora', 'bottleneck', 'prompt')
        if (m, k) != ('gpt2', 'prompt')
    )
    yield from (
        dict(model=m, optimizer=o, tokens=256)
        for m in ('llama', 't5')
        for o in ('adamw8bit', 'bitsandbytes', 'adafactor', 'sgd')
    )
    yield from (dict(model=m, precision='bf16', tokens=512) for m in small)
    yield from (
        dict(model='llama', method=k, dtype='bfloat16', tokens=n, checkpointing=c)
        for k, n, c in (
            ('lora', 512, False),
            ('lora', 4096, False),
            ('lora', 1024, True),
            ('prompt', 512, False),
            ('bottleneck', 512, False),
        )
    )
    yield from (
        dict(model='smollm2-135m', **c)
        for c in (
            dict(tokens=128),
            dict(tokens=256, optimizer='adafactor'),
            dict(tokens=256, optimizer='bitsandbytes', checkpointing=True),
            dict(method='lora', tokens=256),
            dict(method='lora', tokens=512, checkpointing=True),
            dict(method='lora', dtype='bfloat16', tokens=256),
            dict(method='bottleneck', tokens=128),
            dict(method='prompt', tokens=128),
            dict(tokens=128, precision='bf16', optimizer='sgd'),
        )
    )
    yield from (
        dict(model='minilm-l6', **c)
        for c in (
            dict(tokens=128, rows=4),
            dict(tokens=256, rows=4, method='lora'),
            dict(tokens=256, rows=2, checkpointing=True, optimizer='adafactor'),
            dict(tokens=256, precision='bf16'),
            dict(tokens=512, method='bottleneck'),
        )
    )
    yield from (
        dict(model='llama', method=k, tokens=256, rows=2) for k in ('prefix', 'ptuning', 'ia3', 'bitfit', 'dora')
    )
    yield from (
        dict(model=m, method=k, tokens=256)
        for m, k in (('gpt2', 'prefix'), ('bert', 'bitfit'), ('t5', 'ia3'), ('t5', 'dora'))
    )
    yield from (
        dict(model='smollm2-135m', method=k, tokens=128) for k in ('prefix', 'ptuning', 'ia3', 'bitfit', 'dora')
    )
    yield from (
        dict(model=m, method='qlora', tokens=n, dtype=d)
        for m, n, d in (
            ('llama', 512, 'float32'),
            ('llama', 2048, 'bfloat16'),
            ('gpt2', 256, 'float32'),
            ('t5', 256, 'float32'),
            ('smollm2-135m', 256, 'bfloat16'),
            ('smollm2-135m', 128, 'float32'),
        )
    )


def ladder():
    "One running example, a rung at a time: SmolLM2-135M at 256 tokens."
    whole = dict(model='smollm2-135m', tokens=256)
    rungs = {
        'transformers, eager attention': dict(attention='eager'),
        'SDPA': dict(attention='sdpa'),
        'packs, loss in chunks, own operators': {},
        'checkpointing': dict(checkpointing=True),
        'Adafactor': dict(checkpointing=True, optimizer='adafactor'),
        '8-bit AdamW': dict(checkpointing=True, optimizer='adamw8bit'),
        '8-bit AdamW inside of backward': dict(checkpointing=True, optimizer='adamw8bit', in_backward=True),
        'LoRA': dict(method='lora', checkpointing=True),
        'LoRA on bfloat16': dict(method='lora', checkpointing=True, dtype='bfloat16'),
        'QLoRA': dict(method='qlora', checkpointing=True, dtype='bfloat16'),
    }
    for rung, c in rungs.items():
        yield dict(whole, **c, ladder=rung)


# The plan and the steps


def small(name):
    "Configurations of small random models."
    import transformers as t

    return dict(
        llama=lambda: t.LlamaConfig(
            vocab_size=8000,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=10,
            num_attention_heads=8,
            num_key_value_heads=4,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        ),
        gpt2=lambda: t.GPT2Config(
            vocab_size=8000,
            n_embd=256,
            n_layer=6,
            n_head=8,
            n_positions=4096,
            bos_token_id=1,
            eos_token_id=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        ),
        bert=lambda: t.BertConfig(
            vocab_size=8000,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=8,
            max_position_embeddings=4096,
        ),
        t5=lambda: t.T5Config(
            vocab_size=8000, d_model=256, d_ff=1024, num_layers=4, num_heads=8, d_kv=32, decoder_start_token_id=0
        ),
    )[name]()


def source_of(name):
    return name if name in ('smollm2-135m', 'minilm-l6') else small(name)


def load(name, dtype, attention):
    "The real model."
    import torch
    from ftbook.memory.configs import _auto_class, read_config
    from ftbook.models.load import as_dtype
    from ftbook.models.shipped import model_folder

    torch.manual_seed(0)
    if name not in ('smollm2-135m', 'minilm-l6'):
        return _auto_class(small(name)).from_config(small(name), dtype=as_dtype(dtype), attn_implementation=attention)
    return _auto_class(read_config(name)).from_pretrained(
        model_folder(name), dtype=as_dtype(dtype), attn_implementation=attention
    )


def method_of(name):
    "(method, function that quantises)."
    from ftbook.methods.ia3 import IA3
    from ftbook.methods.bitfit import BitFit
    from ftbook.methods.bottleneck_method import Bottleneck
    from ftbook.methods.lora_method import LoRA
    from ftbook.methods.prefix_tuning import PrefixTuning
    from ftbook.methods.prompt_tuning import PromptTuning
    from ftbook.methods.p_tuning import PTuning

    if name == 'qlora':
        from ftbook.methods.quant import quantize_

        return LoRA(), quantize_
    return dict(
        full=None,
        lora=LoRA(),
        dora=LoRA(use_dora=True),
        bottleneck=Bottleneck(),
        ia3=IA3(),
        bitfit=BitFit(),
        prompt=PromptTuning(num_virtual_tokens=20),
        prefix=PrefixTuning(num_virtual_tokens=20),
        ptuning=PTuning(num_virtual_tokens=20),
    )[name], None


def optimizer_of(name, in_backward=False):
    "(what the plan is told, what really runs)."
    from ftbook.training import optimizer_names as training_optimizer_names

    if in_backward:
        return training_optimizer_names.in_backward(name), training_optimizer_names.in_backward(name)
    return name, training_optimizer_names.as_optimizer(name)


def planned(c, method, quantize, optimizer):
    from ftbook.memory.plan import plan

    return plan(
        source_of(c['model']),
        method,
        quantize=quantize,
        dtype=c['dtype'],
        seq_len=c['tokens'],
        batch_size=c['rows'],
        optimizer=optimizer,
        **MIXED[c['precision']],
        gradient_checkpointing=c['checkpointing'],
        attention=c['attention'],
    )


def by_finetune(model, c, optimizer):
    "Two steps of `finetune`."
    from ftbook.training import tune as training_tune
    from ftbook.data.examples import Example

    n = c['tokens']
    losses = []
    rows = [Example(ids.tolist(), [False] + [True] * (n - 1), index=i) for i, ids in enumerate(tokens(model, c))]

    def run():
        losses.extend(
            (h['loss'], h['seconds'])
            for h in training_tune.finetune(
                model,
                rows,
                max_steps=2,
                batch_size=c['rows'],
                max_tokens=n * c['rows'],
                lr=1e-4,
                **MIXED[c['precision']],
                gradient_checkpointing=c['checkpointing'],
                progress=False,
                optimizer=None if c['optimizer'] == 'adamw' else optimizer,
            ).history
        )

    return run, losses


def tokens(model, c):
    "Random rows for two steps; both steps see the same one where a step has one row."
    import torch

    torch.manual_seed(1)
    rows = torch.randint(3, model.config.vocab_size, (2 * c['rows'], c['tokens']))
    return rows if c['rows'] > 1 else rows[:1].expand(2, -1)


def fill(batch, ids):
    "The batch with these tokens, asked for where it asked before."
    import torch
    from dataclasses import replace
    from ftbook.data.examples import IGNORE

    if isinstance(batch, dict):
        labels = batch['labels'] if batch['labels'].dim() == 1 else torch.where(batch['labels'] == IGNORE, IGNORE, ids)
        return dict(batch, input_ids=ids.clone(), labels=labels)
    return replace(batch, input_ids=ids.clone(), labels=torch.where(batch.labels == IGNORE, IGNORE, ids))


def by_steps(model, c, optimizer, stack):
    "The same two steps, with the loss of transformers or with an optimizer that runs inside of backward."
    import torch
    from ftbook.memory import step as memory_step
    from ftbook.training import batches as training_batches
    from ftbook.training import objective as training_objective
    from ftbook.training import optimizer_names as training_optimizer_names

    model.train().config.use_cache = False
    own = not memory_step.is_causal(model) or c['attention'] is not None
    packs = False if own else stack.enter_context(training_batches.isolated(model, True))
    if c['checkpointing']:  # transformers renamed it in 5
        renamed = hasattr(model, 'activation_checkpointing_enable')
        enable = getattr(model, f'{"activation" if renamed else "gradient"}_checkpointing_enable')
        enable(dict(use_reentrant=False))
    batch = fill(memory_step.full_batch(model, packs, c['tokens'], c['rows']), tokens(model, c)[: c['rows']])
    objective = memory_step.OwnLoss(model) if own else training_objective.Objective(model)
    found, started, losses = [], [], []

    class Noted(torch.nn.Module):
        def forward(self, batch):
            started.append(time.perf_counter())
            value = objective(batch) / (1 if own else c['rows'] * (c['tokens'] - 1))
            found.append(value.item())
            return value

    trained = [p for p in model.parameters() if p.requires_grad]
    opt = optimizer(training_optimizer_names.parameter_groups(trained))

    def run():
        memory_step.run_steps(Noted(), batch, opt, MIXED[c['precision']].get('precision'))
        losses.extend(zip(found, (b - a for a, b in zip(started, [*started[1:], time.perf_counter()]))))

    return run, losses


def ready(c, stack):
    "(function that takes two steps, where it writes losses and seconds, does `finetune` run it?) with the real model."
    from ftbook.memory import step as memory_step

    method, quantize = method_of(c['method'])
    real = optimizer_of(c['optimizer'], c['in_backward'])[1]
    model = load(c['model'], c['dtype'], c['attention'])
    if quantize:
        model = quantize(model) or model
    if method:
        model = method.apply(model)
    finetuned = memory_step.is_causal(model) and c['attention'] is None and not c['in_backward']
    return *(by_finetune(model, c, real) if finetuned else by_steps(model, c, real, stack)), finetuned
