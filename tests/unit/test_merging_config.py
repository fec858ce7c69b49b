"Errors and private helpers of ftbook.merging.config."

from fastcore.test import test_fail as check_fail
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ftbook.merging.config import read_config


def test_dict_1():
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
    for change, said in [
        (dict(densitty=1), "'densitty' is not supported"),
        (dict(merge_method='nuslerp'), "'nuslerp' is not supported"),
        (dict(base_model=None), 'needs a base_model'),
        (dict(models=models * 2), 'is listed twice'),
        (dict(parameters=dict(wieght=1)), "'wieght' is not supported"),
        (dict(dtype='float8'), 'dtype must be one of'),
    ]:
        check_fail(lambda: read_config({**ties, **change}), contains=said)
