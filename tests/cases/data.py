"Tokenizers with made-up templates, and small models of several families."

import pytest, torch
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).filter(str.strip)
chatml = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}<e>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def tokenizer_of(template, pad_token="<e>"):
    "Build a tokenizer of single bytes, whose padding token is the token that ends a turn."
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocab = {c: i for i, c in enumerate(["<b>", "<e>", "<s>", "<turn>", *sorted(alphabet)])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tk = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<b>",
        eos_token="<e>",
        pad_token=pad_token,
        additional_special_tokens=["<s>", "<turn>"],
    )
    tk.chat_template = template
    return tk


# Isolation, in families that differ in their attention

small = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
families = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "phi3": dict(pad_token_id=0),
    "olmo2": {},
    "granite": {},
    "starcoder2": {},
    "mistral": dict(sliding_window=5),
    "gemma3_text": dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"] * 2),
    "gpt_neox": dict(num_key_value_heads=4),
    "gpt2": dict(n_embd=32, n_head=4, n_layer=4, n_positions=64),
}


@pytest.fixture(params=families)
def model(request):
    torch.manual_seed(0)
    given = families[request.param]
    config = AutoConfig.for_model(
        request.param, **({**small, **given} if request.param != "gpt2" else dict(vocab_size=128, **given))
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model


def plain_llama(seed=0, **more):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **small | more)).eval()
