"Errors and private helpers of ftbook.memory.tricks."
from fastcore.test import test_fail as check_fail
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from ftbook.memory.step import Setting
from ftbook.memory.tricks import checkpoint_


def test_checkpoint_1():
    def small_config(layers=4, **more): return LlamaConfig(**dict(vocab_size=2000, hidden_size=128, intermediate_size=384, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True) | more)
    def small_model(layers=4, **more):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(small_config(layers, **more))
    setting, model = Setting(seq_len=256), small_model()
    check_fail(lambda: checkpoint_(model, only='norms'), contains="'attention' or 'mlp'")
    check_fail(lambda: checkpoint_(nn.Linear(2, 2)), contains='no layers')
