"A small module that takes any method."

import pytest, torch
from torch import nn

from ftbook.methods import files as methods_files
from ftbook.methods.lora_method import LoRA


def small(vocab=50, width=32, layers=2):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=vocab,
            tie_word_embeddings=True,
        )
    )


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}, [
        n for n, p in model.named_parameters() if p.requires_grad
    ]


def untouched(model, before):
    return (
        list(model.state_dict()) == list(before[0])
        and all(torch.equal(v, before[0][k]) for k, v in model.state_dict().items())
        and [n for n, p in model.named_parameters() if p.requires_grad] == before[1]
        and not hasattr(model, "ftbook_method")
    )


@pytest.fixture
def saved(tmp_path):
    model = LoRA(rank=2).apply(small())
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    methods_files.save_adapter(model, tmp_path / "a")
    return model, tmp_path / "a"
