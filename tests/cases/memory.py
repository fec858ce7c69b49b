"A Llama of any width."

from transformers import LlamaConfig


def llama(layers=4, **more):
    return LlamaConfig(
        **dict(
            vocab_size=2000,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        | more
    )
