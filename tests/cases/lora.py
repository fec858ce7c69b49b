"Small models for LoRA, beside their twins in peft."

import torch
from torch import nn

from ftbook.methods.lora_method import LoRA
from ftbook.methods.parts import parts_of
from tiny import random_batch, seeded

vocab = 60


def llama(tied=False, **kw):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=vocab,
            tie_word_embeddings=tied,
            **kw,
        )
    )


def qwen():
    from transformers import Qwen2Config, Qwen2ForCausalLM  # biases on q, k and v

    return Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=vocab,
        )
    )


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel  # Conv1D

    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=32,
            n_layer=2,
            n_head=4,
            vocab_size=vocab,
            n_positions=64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def bert():
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            vocab_size=vocab,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            vocab_size=vocab,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        )
    )


small_models = {"Llama": llama, "Qwen2": qwen, "GPT-2": gpt2, "BERT": bert, "T5": t5}


def make(name, seed=0):
    return seeded(small_models[name], seed)


def batch(*args, **kw):
    return random_batch(vocab, *args, **kw)


def peft_twin(model, **config):
    "The same adapter in peft's form."
    import peft

    given = {"target_modules": "all-linear", **config}
    return peft.get_peft_model(model, peft.LoraConfig(**given))


def gap(pairs):
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


def grads(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


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
