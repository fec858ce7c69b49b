"Small models to quantise."

import torch

from tiny import random_batch, seeded

vocab = 60
cpu = "cpu"


def llama(tied=False, hidden=64):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=vocab,
            tie_word_embeddings=tied,
        )
    )


def qwen():
    from transformers import Qwen2Config, Qwen2ForCausalLM  # biases on q, k and v

    return Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=vocab,
        )
    )


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel  # Conv1D, a tied head

    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=64,
            n_layer=2,
            n_head=4,
            vocab_size=vocab,
            n_positions=64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            vocab_size=vocab,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        )
    )


small_models = {"Llama": llama, "Qwen2": qwen, "GPT-2": gpt2, "T5": t5}


def make(name, seed=0):
    return seeded(small_models[name], seed)


def batch(**kw):
    return random_batch(vocab, **kw)


def logits(model):
    return model(**batch()).logits.detach()


def gap(p, q):
    return float((p.detach().float() - q.detach().float()).abs().max())


def shaken(model, std=0.1):
    "Give every trained number another value; B must not stay zero."
    torch.manual_seed(5)
    for n in model.ftbook_added:
        p = model.get_parameter(n)
        p.data.add_(std * torch.randn_like(p))
    return model


def grads(model):
    model.zero_grad()
    model(**batch()).loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    # a bias on keys has no gradient, whatever it is
    moving = sum(g.abs().max() > 1e-8 for g in found.values())
    assert moving > 0.8 * len(found), "a comparison of zeros proves nothing"
    return found
