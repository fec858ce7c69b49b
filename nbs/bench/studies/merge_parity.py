"""Every method of merging against mergekit, tensor by tensor.

Both sides get the same files and the same YAML, and what is compared are the files that they write. Where a method
draws at random, the question comes with the random numbers, and mergekit's call of `torch.bernoulli` reads them
instead.
"""

import json, os, tempfile
from functools import cache
from pathlib import Path

from merges import NAMES, SIDE, question

KEY = ('question',)
PACKAGES = 'torch', 'transformers', 'numpy', 'ftbook'
PER_PROCESS = 100  # all of them
SEED = 3


def plan(runs):
    "Every question once."
    for name in QUESTIONS:
        yield dict(question=name)


def run(job):
    "One question; all are put at once."
    return asked()[job['question']]


@cache
def asked():
    "The runs by question."
    return {r['question']: r for r in parity()}


def parity():
    "Put every question to both sides: the runs."
    from rivals import ask as ask_rival

    with tempfile.TemporaryDirectory() as tmp:
        folder, here = Path(tmp), Path.cwd()
        ask(folder)
        ask_rival('mergekit', str(SIDE), 'answer', folder)
        rival = json.loads((folder / 'versions.json').read_text())
        os.chdir(folder)
        try:
            return [compare(folder, i, name) | dict(rival=rival) for i, name in enumerate(QUESTIONS)]
        finally:
            os.chdir(here)


# The questions


def model(name, **kw):
    return dict(model=name, **({'parameters': kw} if kw else {}))


def three(weights=(1.0, 0.5, 0.7), **kw):
    return [model(n, weight=w, **kw) for n, w in zip(NAMES, weights)]


GRADIENT = [dict(filter='self_attn', value=[0, 0.5, 0.3, 1]), dict(filter='mlp', value=[1, 0.2]), dict(value=0.5)]
QUESTIONS = {
    'linear': question('linear', three(), None),
    'linear, not normalized': question('linear', three(), None, parameters=dict(normalize=False)),
    'slerp': question('slerp', [model('base'), model('red')], parameters=dict(t=0.3)),
    'slerp, gradient and filters': question('slerp', [model('base'), model('red')], parameters=dict(t=GRADIENT)),
    'task_arithmetic': question('task_arithmetic', three()),
    'task_arithmetic, negation': question(
        'task_arithmetic', three((1.0, -0.8, 0.3)), parameters={'lambda': 0.6, 'normalize': True}
    ),
    'ties': question('ties', three(density=0.4)),
    'ties, equal weights': question('ties', three((0.5, 0.5, 0.5), density=0.4)),
    'ties, equal weights, sum': question('ties', three((0.5, 0.5, 0.5), density=0.4), parameters=dict(normalize=False)),
    'ties, sum': question(
        'ties', three(density=0.2), parameters={'normalize': False, 'lambda': 0.7, 'int8_mask': True}
    ),
    'ties, rescaled': question('ties', three(density=0.4), parameters=dict(rescale=True)),
    'ties, gradients': question('ties', [model(n, weight=GRADIENT, density=[1, 0.3, 0.1]) for n in NAMES]),
    'ties, base listed': question('ties', [model('base'), *three(density=0.4)]),
    'dare_linear': question('dare_linear', three(density=0.4)),
    'dare_linear, not rescaled': question('dare_linear', three(density=0.4), parameters=dict(rescale=False)),
    'dare_ties': question('dare_ties', three(density=0.4)),
    'breadcrumbs': question('breadcrumbs', three(density=0.6, gamma=0.1)),
    'breadcrumbs_ties': question('breadcrumbs_ties', three(density=0.6, gamma=0.1), parameters=dict(rescale=True)),
    'della': question('della', three(density=0.5, epsilon=0.3)),
    'della_linear': question('della_linear', three(density=0.5, epsilon=0.1)),
    'model_stock': question('model_stock', [model(n) for n in NAMES]),
    'model_stock, by row': question('model_stock', [model(n) for n in NAMES], parameters=dict(filter_wise=True)),
    'sce': question('sce', [model(n) for n in NAMES]),
    'sce, selected': question('sce', [model(n) for n in NAMES], parameters=dict(select_topk=0.3)),
    'karcher': question('karcher', [model(n) for n in NAMES], None),
    'passthrough, slices': dict(
        merge_method='passthrough',
        dtype='float32',
        slices=[
            dict(sources=[dict(model='red', layer_range=[0, 3])]),
            dict(sources=[dict(model='blue', layer_range=[1, 4])]),
        ],
    ),
    'slerp, slices': dict(
        merge_method='slerp',
        dtype='float32',
        base_model='base',
        parameters=dict(t=[0, 1]),
        slices=[dict(sources=[dict(model='base', layer_range=[1, 3]), dict(model='red', layer_range=[1, 3])])],
    ),
    'linear, a LoRA adapter': question('linear', [model('red', weight=1.0), model('base+adapter', weight=2.0)], None),
    'linear, union of tokens': question(
        'linear', [model('red', weight=1.0), model('more tokens', weight=2.0)], None, tokenizer_source='union'
    ),
    'ties, union of tokens, padded': question(
        'ties',
        [model('red', weight=1.0, density=0.5), model('more tokens', weight=2.0, density=0.5)],
        tokenizer=dict(source='union', pad_to_multiple_of=64),
    ),
    'task_arithmetic, tokens of the base': question(
        'task_arithmetic', [model('red', weight=1.0), model('more tokens', weight=2.0)], tokenizer_source='base'
    ),
    'ties, bfloat16 out': question('ties', three(density=0.4), out_dtype='bfloat16'),
}


def small(name, seed, tokens=0):
    "A small Llama; all but the base are the base and a little."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    made = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=tokens or 120,
            initializer_range=0.1,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.02 * bool(seed) * torch.randn(p.shape, generator=generator))
    return made


def words(n, extra=()):
    "A tokenizer of n words, and some that are added."
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({f'w{i}': i for i in range(n)}, [])))
    made.add_tokens(list(extra))
    return made


def ask(folder):
    "Write models, configurations and random numbers."
    import torch, yaml
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from ftbook.merging.chance import coins

    for seed, name in enumerate(('base', *NAMES)):
        small(name, seed).save_pretrained(folder / name, max_shard_size='60KB' if name == 'blue' else '1GB')
        words(118).save_pretrained(folder / name)
    small('more tokens', 9, 125).save_pretrained(folder / 'more tokens')
    words(118, ['<one>', '<two>', '<three>']).save_pretrained(folder / 'more tokens')
    adapted = get_peft_model(small('base', 0), LoraConfig(r=3, lora_alpha=5, target_modules=['q_proj', 'down_proj']))
    for p in adapted.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    adapted.save_pretrained(folder / 'adapter')
    shapes = {k: p.numel() for k, p in small('base', 0).named_parameters()}
    save_file(
        {
            f'{k}/{n}': torch.from_numpy(coins(f'{SEED}/{k}/{n}', 0, size).astype('int64'))
            for k, size in shapes.items()
            for n in NAMES
        },
        folder / 'coins.safetensors',
    )
    for i, c in enumerate(QUESTIONS.values()):
        (folder / f'{i}.yml').write_text(yaml.safe_dump(c))


# The answers


def tensors(folder):
    from safetensors.torch import load_file

    return {k: t for f in folder.glob('*.safetensors') for k, t in load_file(f).items()}


def compare(folder, i, name):
    "The largest difference of any tensor between the two answers."
    from ftbook.merging.engine import merge

    merge(str(folder / f'{i}.yml'), folder / f'ours {i}', seed=SEED, hashes=False)
    a, b = tensors(folder / f'ours {i}'), tensors(folder / f'theirs {i}')
    b = {k: t for k, t in b.items() if k in a or k != 'lm_head.weight'}
    if a.keys() != b.keys():
        raise ValueError(f'{name}: only one side has {sorted(a.keys() ^ b.keys())[:3]}')
    base = tensors(folder / 'base')
    config = [json.loads((folder / f'{side} {i}' / 'config.json').read_text()) for side in ('ours', 'theirs')]
    same = all(config[0].get(k) == config[1].get(k) for k in ('num_hidden_layers', 'vocab_size', 'dtype'))
    return dict(
        question=name,
        tensors=len(a),
        dtype=str(next(iter(a.values())).dtype).removeprefix('torch.'),
        largest=max(float((t.float() - b[k].float()).abs().max()) for k, t in a.items()),
        effect=max(float((t - base[k]).abs().max()) for k, t in a.items() if k in base and t.shape == base[k].shape),
        same_configuration=same,
    )
