"Examples and a tiny model to train."

import random

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ftbook.data.examples import Example

V = 97


def example(rng, n, n_prompt=None, index=None):
    "A row of random tokens."
    n_prompt = max(1, n // 3) if n_prompt is None else n_prompt
    return Example([rng.randrange(V) for _ in range(n)], [i >= n_prompt for i in range(n)], n_prompt, index=index)


def rows(n=12, seed=0, opening=0):
    "Rows of 5 to 40 tokens, all with the same `opening`."
    rng = random.Random(seed)
    head = [rng.randrange(V) for _ in range(opening)]
    made = [example(rng, rng.randint(5, 40), index=i) for i in range(n)]
    return [
        Example(head + e.input_ids, [False] * opening + e.trained, opening + e.n_prompt, index=e.index) for e in made
    ]


def tiny(seed=0, **more):
    torch.manual_seed(seed)
    shape = dict(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(LlamaConfig(**shape | more))


def trained(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


# Models in which tokens meet elsewhere than in attention

rows_few = [example(random.Random(n), n, index=n) for n in (7, 19, 4, 12, 9)]
