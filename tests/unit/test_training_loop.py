"Errors and private helpers of ftbook.training.loop."
from fastcore.test import test_close as check_close
import copy
import random

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ftbook.data.corpora import load_corpus, term_rows
from ftbook.data.encoding import encode
from ftbook.data.isolate import isolate_
from ftbook.data.split import split_rows
from ftbook.models.load import load_model
from ftbook.training.loop import Loop
from ftbook.training.settings import Settings


def test_zip_1():
    model, tokenizer = load_model('smollm2-135m', dtype='float32', device='cpu')
    jargon = term_rows(load_corpus('jargon'))
    rows, held_out = split_rows(random.Random(0).sample(jargon, 60), 20)
    examples = encode(rows[:16], tokenizer, max_length=128)
    def make_tiny():
        "A Llama with two layers of width 32, and random weights."
        torch.manual_seed(0)
        shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
        return isolate_(LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)))
    tiny = make_tiny()
    def half_square(model, step): return .5*sum(p.square().sum() for p in model.parameters())

    def one_plain_step(**more):
        loop = Loop(copy.deepcopy(tiny), examples, Settings(lr=.1, batch_size=8, warmup=0, max_grad_norm=None), **more)
        return loop.take_step(), [p.detach() for p in loop.params]

    pulled, by_hand = one_plain_step(optimizer=torch.optim.SGD, regularizer=half_square), one_plain_step(optimizer=lambda groups: torch.optim.SGD([g | dict(weight_decay=1.) for g in groups]))
    for a, b in zip(pulled[1], by_hand[1]): check_close(a, b, eps=1e-6)
    check_close(pulled[0]['penalty'], half_square(tiny, 0).item(), eps=1e-3)
