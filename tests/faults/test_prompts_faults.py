"Soft prompts: settings, files, caches and arguments that do not fit."

import copy, json

import pytest, torch
from safetensors.torch import load_file, save_file

from ftbook.methods.files import load_adapter, save_adapter
from ftbook.methods.fold import remove_
from ftbook.methods.soft_method import CHILD
from ftbook.methods.prefix_tuning import PrefixTuning
from ftbook.methods.prompt_tuning import PromptTuning
from ftbook.methods.p_tuning import PTuning
from cases.prompts import both_kinds, causal, examples, gap, grads, lively, logits, make, n, say, tokens, vocab


# Across the border


@pytest.mark.parametrize(
    "field, value",
    [
        ("trainable_token_indices", [1]),
        ("num_transformer_submodules", 2),
        ("modules_to_tie", ["lm_head"]),
        ("a_field_of_next_year", 7),
    ],
)
@both_kinds
def test_fields_that_would_change_the_result_are_refused(method, field, value, tmp_path):
    save_adapter(method.apply(make("Llama")), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ValueError, match=field):
        load_adapter(make("Llama"), tmp_path)


@both_kinds
def test_files_that_do_not_fit(method, tmp_path):
    save_adapter(method.apply(make("Llama")), tmp_path)
    torch.manual_seed(0)
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=vocab,
        )
    )
    said = (
        r"prompt_embeddings is \(5, 32\) in the file and \(5, 64\) in the model"
        if type(method) is PromptTuning
        else "made for 2 layers of 2 key heads and 8 numbers each; this model has 2, 2 and 16"
    )
    with pytest.raises(ValueError, match=said):
        load_adapter(wide, tmp_path)
    assert (
        not hasattr(wide, "ftbook_method")
        and not hasattr(wide, CHILD)
        and all(p.requires_grad for p in wide.parameters())
    )
    weights = tmp_path / "adapter_model.safetensors"
    whole, held = weights.read_bytes(), load_file(weights)
    weights.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="is damaged"):
        load_adapter(make("Llama"), tmp_path)
    held["prompt_embeddings"][0, 0] = float("nan")
    save_file(held, weights)
    with pytest.raises(ValueError, match="NaN or infinite"):
        load_adapter(make("Llama"), tmp_path)
    save_file({"prompt_embeddings": torch.zeros(n + 1, held["prompt_embeddings"].shape[1])}, weights)
    with pytest.raises(ValueError, match=r"is \(6, "):
        load_adapter(make("Llama"), tmp_path)
    save_file({"lora": torch.zeros(2)}, weights)
    with pytest.raises(ValueError, match="lacks prompt_embeddings"):
        load_adapter(make("Llama"), tmp_path)


def test_heads_that_happen_to_have_the_same_size(tmp_path):
    save_adapter(PrefixTuning(n).apply(make("Llama")), tmp_path)
    path = tmp_path / "adapter_config.json"
    # 4 heads of 4 take as much as 2 of 8
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_attention_heads": 4}))
    with pytest.raises(ValueError, match="2 layers of 4 key heads and 4 numbers"):
        load_adapter(make("Llama"), tmp_path)


# Training


@pytest.mark.parametrize("name", causal)
def test_prefixes_do_not_go_with_checkpointing(name, examples):
    from ftbook.training.evaluate import evaluate
    from ftbook.training.tune import finetune

    m = PrefixTuning(n).apply(make(name))
    want = m.eval()(tokens()).logits.detach()
    with pytest.raises(ValueError, match="gradient checkpointing.*gradient_checkpointing=False"):
        finetune(m, examples, gradient_checkpointing=True, progress=False)
    m.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        m.train()(tokens())
    assert gap([(m.eval()(tokens()).logits, want)]) < 1e-6  # there is nothing to compute again
    assert evaluate(m, examples).loss > 0
    m.gradient_checkpointing_disable()
    m.train()(tokens(), labels=tokens()).loss.backward()
    assert all(g.abs().max() > 0 for g in grads(m).values())


def test_a_cache_that_is_dropped_is_noticed(monkeypatch):
    m = PrefixTuning(n).apply(make("Llama")).eval()
    kept = m.model.layers[0].forward
    monkeypatch.setattr(m.model.layers[0], "forward", lambda *a, cache=None, attention_mask=None, **kw: kept(*a, **kw))
    with pytest.raises(ValueError, match="has dropped the prefix"):
        m(tokens())


# Coming and going


@both_kinds
def test_a_call_that_failed_leaves_nothing_behind(method, monkeypatch):
    m = method.apply(make("Llama"))
    want, last = m(tokens()).logits.detach(), m.model.layers[1]
    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="out of memory"):
        broken.setattr(last, "forward", lambda *a, **kw: (_ for _ in ()).throw(RuntimeError("out of memory")))
        m(tokens())
    for model in (copy.deepcopy(m), m):
        assert gap([(model(tokens()).logits, want)]) < 1e-6


# Bad input


@pytest.mark.parametrize("kind", [PromptTuning, PrefixTuning])
@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(num_virtual_tokens=0), "at least 1"),
        (dict(num_virtual_tokens=-1), "at least 1"),
        (dict(num_virtual_tokens=2.0), "a whole number"),
        (dict(num_virtual_tokens=True), "=True"),
        (dict(num_virtual_tokens="8"), "='8'"),
        (dict(num_virtual_tokens=None), "=None"),
        (dict(init="best"), "one of 'random'"),
        (dict(init=None), "one of 'random'"),
        (dict(init="text"), "needs `text`"),
        (dict(init="text", text="hi"), "`tokenizer` is needed"),
        (dict(init="text", text=[]), "has no tokens"),
        (dict(text="hi"), "makes no use of it"),
    ],
)
def test_bad_hyperparameters(kind, wrong, said):
    with pytest.raises(ValueError, match=said):
        kind(**wrong)


def test_more_bad_hyperparameters():
    class Mute:
        def __call__(self, text):
            return dict(input_ids=[])

    with pytest.raises(ValueError, match="has no tokens"):
        PromptTuning(n, "text", "   ", Mute())
    with pytest.raises(ValueError, match="one of 'random', 'zero', 'text'"):
        PrefixTuning(n, "vocabulary")
    with pytest.raises(ValueError, match="one of 'random', 'vocabulary', 'text'"):
        PromptTuning(n, "zero")
    with pytest.raises(ValueError, match="leave projection out"):
        PrefixTuning(n, "text", [1], projection=True)
    for kind in (PTuning, PrefixTuning):
        for size in (0, 1.5, True):
            with pytest.raises(ValueError, match="encoder_hidden_size"):
                kind(n, encoder_hidden_size=size)
    for bad in (vocab, -1):
        for method in (PromptTuning(n, "text", [1, bad]), PrefixTuning(n, "text", [1, bad])):
            m = make("Llama")
            with pytest.raises(ValueError, match=f"token id {bad} is not in the vocabulary of 60"):
                method.apply(m)
            assert all(p.requires_grad for p in m.parameters()) and not hasattr(m, CHILD)
    with pytest.raises(ValueError, match="not a model of transformers"):
        PromptTuning(n).apply(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    "name, method, said",
    [
        ("BERT", PrefixTuning(n), "an encoder.*use PromptTuning"),
        ("T5", PrefixTuning(n), "an encoder.*use PromptTuning"),
        ("Mamba", PrefixTuning(n), "a recurrent state.*use LoRA"),
        ("Mamba", PromptTuning(n), "a recurrent state.*use LoRA"),
        ("Mistral", PrefixTuning(n), "a sliding window"),
        ("GPT-2", PromptTuning(64), "learnt positions.*There are 64, and 64 virtual"),
        ("GPT-2", PrefixTuning(70), "learnt positions"),
    ],
)
def test_obstacles(name, method, said):
    m = make(name)
    with pytest.raises(ValueError, match=said):
        method.apply(m)
    assert all(p.requires_grad for p in m.parameters()) and not hasattr(m, CHILD) and not hasattr(m, "ftbook_packs")


@both_kinds
def test_a_text_too_long_for_the_positions(method):
    m = lively(method, make("GPT-2"))
    with torch.no_grad():
        assert m(tokens(1, 59)).logits.shape[1] == 59
    with pytest.raises(ValueError, match="There are 64, and 5 virtual and 60 real tokens"):
        m(tokens(1, 60))
    pad = torch.cat([torch.zeros(1, 20, dtype=torch.long), tokens(1, 44)], 1)
    assert logits(m, pad, attention_mask=(pad > 0).long()).shape[1] == 64  # padding takes no position
    with pytest.raises(ValueError, match="learnt positions"):
        m.generate(tokens(1, 58), attention_mask=torch.ones(1, 58), **say)


@both_kinds
def test_caches_that_do_not_fit(method):
    m, ids = make("Llama").eval(), tokens()
    with torch.no_grad():
        before = m(ids, use_cache=True).past_key_values
    method.apply(m)
    with pytest.raises(ValueError, match="a cache of fixed size.*leave `cache_implementation` out"):
        m.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation="static", **say)
    with pytest.raises(ValueError, match="read without these 5 virtual ones"):
        m(ids, past_key_values=before)
    with torch.no_grad():
        mine = m(ids, use_cache=True).past_key_values
    remove_(m)
    type(method)(n + 1).apply(m)
    with pytest.raises(ValueError, match="start with an empty cache"):
        m(ids, past_key_values=mine)


@both_kinds
def test_arguments_that_cannot_be_widened(method):
    m, ids = method.apply(make("Llama")), tokens()
    with pytest.raises(ValueError, match=r"shape \(2, 1, 12, 12\) cannot be widened"):
        m(ids, attention_mask=torch.zeros(2, 1, 12, 12))
    if type(method) is PromptTuning:
        with pytest.raises(ValueError, match="colours has a value for every token"):
            m(ids, colours=torch.zeros(2, 12))
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        m()
