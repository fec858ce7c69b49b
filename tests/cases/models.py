"A fresh Python, and small models of several families."

import os, subprocess, sys

import pytest
import transformers as tf

from book import root
from ftbook.models.shipped import model_folder


# Preparing

in_a_new_python = """
from ftbook.models import shipped
from ftbook.models.device import probe_device
from ftbook.models.load import check_weights, load_model
from ftbook.models.shipped import model_folder
"""


def python(code, **env):  # Start a Python that has the names of ftbook's models
    return subprocess.Popen(
        [sys.executable, "-c", in_a_new_python + code],
        cwd=root,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# Loading others


def llama(**more):
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(
            **dict(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                intermediate_size=24,
                vocab_size=49152,
                max_position_embeddings=64,
            )
            | more
        )
    )


@pytest.fixture
def saved(tmp_path):  # A tiny model in a folder, with the tokenizer of the shipped one
    model, tokenizer = llama(), tf.AutoTokenizer.from_pretrained(model_folder("smollm2-135m"))
    for o in (model, tokenizer):
        o.save_pretrained(tmp_path / "tiny")
    return model.eval(), tmp_path / "tiny"


# Counting

t5 = tf.T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, vocab_size=50)
small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=50)
families = {
    "llama tied": lambda: llama(tie_word_embeddings=True),
    "llama": llama,
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=8, bos_token_id=0, eos_token_id=0)
    ),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**small)),
    "bert classifier": lambda: tf.BertForSequenceClassification(tf.BertConfig(**small)),
    "roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**small)),
    "distilbert": lambda: tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=24, vocab_size=50)
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(t5),
    "bart": lambda: tf.BartForConditionalGeneration(
        tf.BartConfig(
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            vocab_size=50,
        )
    ),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=24,
            vocab_size=50,
            word_embed_proj_dim=16,
        )
    ),
    "neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**small)),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=50)),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**small)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**small, num_key_value_heads=1, head_dim=8)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**small, num_key_value_heads=1, num_local_experts=2)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**small, num_key_value_heads=1, head_dim=8)),
}
