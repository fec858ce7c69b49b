"Errors and private helpers of ftbook.memory.plan."
from fastcore.test import test_eq as check_eq, test_fail as check_fail
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ftbook.memory.advice import longest_sequence
from ftbook.memory.plan import plan
from ftbook.methods.lora_method import LoRA


def test_plan_1():
    def small_config(layers=4, **more): return LlamaConfig(**dict(vocab_size=2000, hidden_size=128, intermediate_size=384, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True) | more)
    shipped = plan('smollm2-135m', seq_len=256)
    for wrong, said in ((lambda: plan('no-such-model'), 'Shipped with ftbook'), (lambda: plan(small_config(), dtype='int3'), 'dtype must be one of'), (lambda: plan(small_config(), optimizer='adam9'), 'optimizer must be one of'),
                        (lambda: plan(small_config(), precision='fp16'), 'fp16 needs a GPU'), (lambda: plan(small_config(), seq_len=0), 'seq_len must be'), (lambda: shipped.fits(0), 'given in GiB'),
                        (lambda: plan(small_config(), sharding='zero9'), 'sharding must be one of'), (lambda: longest_sequence(small_config(), gpu=-4), 'given in GiB')):
        check_fail(wrong, contains=said)


def test_longest_sequence_1():
    def small_config(layers=4, **more): return LlamaConfig(**dict(vocab_size=2000, hidden_size=128, intermediate_size=384, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True) | more)
    def small_model(layers=4, **more):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(small_config(layers, **more))
    check_fail(lambda: plan(small_config(), LoRA(target_modules=['no_such_layer'])), contains='matches nothing')
    check_fail(lambda: plan(small_model().requires_grad_(False)), contains='nothing of the model would be trained')
    check_eq(longest_sequence(small_config(), gpu=.001), 0)
