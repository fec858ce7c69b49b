"Counting the parameters of other families, which name their modules in other ways."

from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from ftbook.models.count import count_parameters


def test_gpt2_keeps_its_attention_in_c_attn():
    config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=10, n_positions=4, bos_token_id=0, eos_token_id=0)
    assert count_parameters(GPT2LMHeadModel(config)) == dict(
        embedding=14 * 8,
        attention=2 * (8 * 24 + 24 + 8 * 8 + 8),
        mlp=2 * (8 * 32 + 32 + 32 * 8 + 8),
        norm=5 * 16,
        head=0,
        other=0,
    )


def test_bert_writes_intermediate_and_output():
    config = BertConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=10
    )
    counts = count_parameters(BertModel(config))
    assert counts["mlp"] == 2 * (8 * 16 + 16 + 16 * 8 + 8)
    assert counts["head"] == 8 * 8 + 8 and counts["other"] == 0
