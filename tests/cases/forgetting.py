"A small model, and a battery that it can be asked."

import pytest, torch
from transformers import LlamaConfig, LlamaForCausalLM

from tiny import save_tiny_model
from ftbook.forgetting import battery as forgetting_battery
from ftbook.data.examples import Example
from ftbook.models.load import load_model


def small_llama(vocab=37, **more):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.3,
            **more,
        )
    )


def rows_of_ids(n=6, vocab=37, seed=0):
    rng = torch.Generator().manual_seed(seed)
    made = [torch.randint(3, vocab, (k,), generator=rng).tolist() for k in range(4, 4 + n)]
    return [Example(ids, [False, False] + [True] * (len(ids) - 2)) for ids in made]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def loaded(tiny):
    return load_model(str(tiny), dtype="float32", device="cpu")


# The battery


def small_battery(tokenizer, **more):
    return forgetting_battery.make_battery(tokenizer, ["newspaper"], n_prompts=2, rows=3, **more)
