"Errors and private helpers of ftbook.merging.plan."

from fastcore.test import test_fail as check_fail
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ftbook.merging.plan import plan_merge


def test_plan_merge_1():
    def small_llama(seed, **kw):
        "A small model; with a seed, a little noise is added to the one without."
        torch.manual_seed(0)
        made, noise = (
            LlamaForCausalLM(
                LlamaConfig(
                    **dict(
                        hidden_size=32,
                        intermediate_size=64,
                        num_hidden_layers=3,
                        num_attention_heads=4,
                        num_key_value_heads=2,
                        vocab_size=100,
                        initializer_range=0.1,
                        tie_word_embeddings=True,
                    )
                    | kw
                )
            ),
            torch.Generator().manual_seed(seed),
        )
        for p in made.parameters():
            p.data += 0.02 * bool(seed) * torch.randn(p.shape, generator=noise)
        return made

    def small_models():
        "A folder with a base and three models that differ from it by a little noise; `red` has several files."
        folder = Path(tempfile.mkdtemp())
        for seed, name in enumerate(('base', 'red', 'blue', 'grey')):
            model = small_llama(seed).bfloat16()
            model.save_pretrained(folder / name, max_shard_size='60KB' if name == 'red' else '1GB')
        return folder

    folder = small_models()
    models = [
        dict(model=str(folder / n), parameters=dict(weight=w, density=0.4)) for n, w in (('red', 1.0), ('blue', 0.5))
    ]
    ties = dict(merge_method='ties', base_model=str(folder / 'base'), models=models, dtype='float32')

    def with_model(name, **change):
        return {**ties, 'models': [models[0], dict(models[1], model=str(folder / name))], **change}

    check_fail(lambda: plan_merge(with_model('base+lora')), contains='neither a folder here')


def test_plan_merge_2():
    def small_llama(seed, **kw):
        "A small model; with a seed, a little noise is added to the one without."
        torch.manual_seed(0)
        made, noise = (
            LlamaForCausalLM(
                LlamaConfig(
                    **dict(
                        hidden_size=32,
                        intermediate_size=64,
                        num_hidden_layers=3,
                        num_attention_heads=4,
                        num_key_value_heads=2,
                        vocab_size=100,
                        initializer_range=0.1,
                        tie_word_embeddings=True,
                    )
                    | kw
                )
            ),
            torch.Generator().manual_seed(seed),
        )
        for p in made.parameters():
            p.data += 0.02 * bool(seed) * torch.randn(p.shape, generator=noise)
        return made

    def small_models():
        "A folder with a base and three models that differ from it by a little noise; `red` has several files."
        folder = Path(tempfile.mkdtemp())
        for seed, name in enumerate(('base', 'red', 'blue', 'grey')):
            model = small_llama(seed).bfloat16()
            model.save_pretrained(folder / name, max_shard_size='60KB' if name == 'red' else '1GB')
        return folder

    folder = small_models()
    models = [
        dict(model=str(folder / n), parameters=dict(weight=w, density=0.4)) for n, w in (('red', 1.0), ('blue', 0.5))
    ]
    ties = dict(merge_method='ties', base_model=str(folder / 'base'), models=models, dtype='float32')
    check_fail(
        lambda: plan_merge(
            {
                **ties,
                'parameters': dict(normalize=True),
                'models': [dict(m, parameters=dict(weight=w)) for m, w in zip(models, (1, -1))],
            }
        ),
        contains='sum to zero',
    )


def test_plan_merge_3():
    def small_llama(seed, **kw):
        "A small model; with a seed, a little noise is added to the one without."
        torch.manual_seed(0)
        made, noise = (
            LlamaForCausalLM(
                LlamaConfig(
                    **dict(
                        hidden_size=32,
                        intermediate_size=64,
                        num_hidden_layers=3,
                        num_attention_heads=4,
                        num_key_value_heads=2,
                        vocab_size=100,
                        initializer_range=0.1,
                        tie_word_embeddings=True,
                    )
                    | kw
                )
            ),
            torch.Generator().manual_seed(seed),
        )
        for p in made.parameters():
            p.data += 0.02 * bool(seed) * torch.randn(p.shape, generator=noise)
        return made

    def small_models():
        "A folder with a base and three models that differ from it by a little noise; `red` has several files."
        folder = Path(tempfile.mkdtemp())
        for seed, name in enumerate(('base', 'red', 'blue', 'grey')):
            model = small_llama(seed).bfloat16()
            model.save_pretrained(folder / name, max_shard_size='60KB' if name == 'red' else '1GB')
        return folder

    folder = small_models()
    models = [
        dict(model=str(folder / n), parameters=dict(weight=w, density=0.4)) for n, w in (('red', 1.0), ('blue', 0.5))
    ]
    ties = dict(merge_method='ties', base_model=str(folder / 'base'), models=models, dtype='float32')
    check_fail(
        lambda: plan_merge({**ties, 'models': [dict(m, parameters=dict(weight=1, density=0)) for m in models]}),
        contains='density=0',
    )
