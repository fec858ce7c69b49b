"Small models for LoRA, beside their twins in peft."

import torch
from torch import nn

from ftbook.methods.lora_method import LoRA
from ftbook.methods.parts import parts_of
from tiny import SMALL as small_models, VOCAB as vocab
from tiny import gap, grads_of as grads, random_batch, seeded, small_llama as llama


def make(name, seed=0):
    return seeded(small_models[name], seed)


def batch(*args, **kw):
    return random_batch(vocab, *args, **kw)


def peft_twin(model, **config):
    "The same adapter in peft's form."
    import peft

    given = {"target_modules": "all-linear", **config}
    return peft.get_peft_model(model, peft.LoraConfig(**given))


# Whatever may happen to a family


def lively(model, **kw):
    LoRA(**{"rank": 4, "alpha": 8, **kw}).apply(model)
    torch.manual_seed(7)
    for o in parts_of(model).values():
        nn.init.normal_(o.lora_B, std=0.1)
    return model


def families(model):
    return {id(o.siblings): o.siblings for o in parts_of(model).values() if o.siblings}.values()


def at_rest(model):
    return all(o.x is None and not o.waiting for o in families(model))
