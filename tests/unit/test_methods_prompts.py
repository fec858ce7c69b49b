"Soft prompts and everything that counts tokens: shapes, caches, generation, training, copies."

import copy, json

import pytest, torch

from ftbook.methods.files import load_adapter, save_adapter
from ftbook.methods.fold import merge_, remove_, unmerge_
from ftbook.methods.protocol import method_of
from ftbook.methods.summary import trainable_summary
from ftbook.methods.soft_method import CHILD, cache_shape
from ftbook.methods.prompt_cases import Case, is_causal, obstacle, position_limit, transformer_of
from ftbook.methods.prefix_tuning import PrefixTuning
from ftbook.methods.prompt_tuning import PromptTuning
from ftbook.methods.p_tuning import PTuning
from ftbook.methods.prefix_attention import attention_by_position
from ftbook.methods.prompt_words import nearest_words
from ftbook.methods.prompts import read_prefix
from cases.prompts import (
    both_kinds,
    cases,
    causal,
    examples,
    gap,
    grads,
    inputs,
    lively,
    llama,
    logits,
    make,
    n,
    say,
    tokens,
    vocab,
)


# Same as the library


def test_counts_are_the_formula():
    m = make("Llama")
    d, (layers, heads, width) = 32, cache_shape(m)
    for method, want in (
        (PromptTuning(n), n * d),
        (PrefixTuning(n), n * 2 * layers * heads * width),
        (
            PrefixTuning(n, projection=True, encoder_hidden_size=9),
            n * 16 + 16 * 9 + 9 + 9 * 2 * layers * heads * width + 2 * layers * heads * width,
        ),
    ):
        assert trainable_summary(method.apply(m)).trained == want
        remove_(m)


@pytest.mark.parametrize("name", causal)
def test_a_text_in_front_in_three_ways(name):
    m, ids, words = make(name).eval(), tokens(1), list(range(3, 3 + n))
    want = logits(m, torch.cat([torch.tensor([words]), ids], 1))[:, n:]
    for method in (PromptTuning(n, "text", words), PrefixTuning(n, "text", words)):
        assert gap([(logits(method.apply(m), ids), want)]) < 1e-5
        remove_(m)


def test_reading_a_text_leaves_dropout_out():
    from transformers import GPT2Config, GPT2LMHeadModel

    m = GPT2LMHeadModel(
        GPT2Config(
            n_embd=32,
            n_layer=2,
            n_head=4,
            vocab_size=vocab,
            n_positions=64,
            embd_pdrop=0.5,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).train()
    assert torch.equal(read_prefix(m, [3, 4]), read_prefix(m, [3, 4])) and all(o.training for o in m.modules())


def test_own_seed_leaves_the_global_one_alone():
    m, state = make("Llama"), torch.get_rng_state()
    for method in (PromptTuning(n), PromptTuning(n, "vocabulary"), PrefixTuning(n, projection=True), PTuning(n)):
        remove_(method.apply(m))
        assert torch.equal(torch.get_rng_state(), state)
    pick = lambda seed: (
        PromptTuning(n, seed=seed).apply(m).get_submodule(CHILD).embedding.detach().clone(),
        remove_(m),
    )[0]
    assert torch.equal(pick(1), pick(1)) and not torch.equal(pick(1), pick(2))


# Across the border


def test_a_network_is_gone_after_saving(tmp_path):
    a = lively(PrefixTuning(n, projection=True), make("Llama"))
    save_adapter(a, tmp_path)
    b = load_adapter(make("Llama"), tmp_path)
    assert method_of(b).projection is False and b.ftbook_added == {f"{CHILD}.embedding": (n, 2 * 2 * 2 * 8)}
    c = load_adapter(make("Llama"), save_adapter(lively(PTuning(n), make("Llama")), tmp_path / "p"))
    assert (
        type(method_of(c)) is PromptTuning
        and json.loads((tmp_path / "p" / "adapter_config.json").read_text())["peft_type"] == "PROMPT_TUNING"
    )


# What the caller sees


@pytest.mark.parametrize("name", causal)
@both_kinds
def test_shapes_are_those_of_the_input(method, name):
    m, ids = lively(method, make(name)), tokens()
    m.set_attn_implementation("eager")
    with torch.no_grad():
        out = m(ids, output_hidden_states=True, output_attentions=True, labels=ids)
        bare = m.base_model(ids, return_dict=False)
        assert out.logits.shape == (2, 12, vocab) and out.loss > 0
        assert {h.shape for h in out.hidden_states} == {(2, 12, 32)} and {a.shape for a in out.attentions} == {
            (2, 4, 12, n + 12)
        }
        assert bare[0].shape == (2, 12, 32) and all(not torch.is_tensor(o) or o.shape[1] == 12 for o in bare)
        assert (
            gap(
                [
                    (
                        m(ids, labels=ids).loss,
                        torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()),
                    )
                ]
            )
            < 1e-6
        )
        assert m(ids, logits_to_keep=1).logits.shape == (2, 1, vocab)
        assert out.past_key_values.get_seq_length() == 12


@pytest.mark.parametrize("name", causal)
@both_kinds
def test_the_same_answer_however_one_asks(method, name):
    m, ids = lively(method, make(name)), tokens()
    want, ones = logits(m, ids), torch.ones(2, 12, dtype=torch.long)
    embeds = m.get_input_embeddings()(ids)
    ways = [
        dict(attention_mask=ones),
        dict(attention_mask=ones.bool()),
        dict(use_cache=False),
        dict(position_ids=torch.arange(12)[None]),
        dict(position_ids=torch.arange(12).expand(2, -1), attention_mask=ones),
    ]
    assert (
        gap([(logits(m, ids, **o), want) for o in ways] + [(logits(m, inputs_embeds=embeds, **o), want) for o in ways])
        < 1e-5
    )
    left, right = ([torch.zeros(2, 3, dtype=torch.long), ids], [ids, torch.zeros(2, 3, dtype=torch.long)])
    for parts, real in ((left, slice(3, None)), (right, slice(0, 12))):
        padded, mask = torch.cat(parts, 1), torch.cat([(p != 0).long() for p in parts], 1)
        assert gap([(logits(m, padded, attention_mask=mask)[:, real], want)]) < 1e-5


def test_bert_keeps_its_own_arguments():
    m, ids = lively(PromptTuning(n), make("BERT")), tokens()
    want = logits(m, ids)
    assert want.shape == (2, 12, vocab)
    assert (
        gap(
            [
                (logits(m, ids, token_type_ids=torch.zeros_like(ids)), want),
                (logits(m, ids, position_ids=torch.arange(12)[None]), want),
            ]
        )
        < 1e-5
    )
    assert gap([(logits(m, ids, token_type_ids=torch.ones_like(ids)), want)]) > 1e-3


def test_encoders_keep_their_own_positions():
    from transformers import RobertaConfig, RobertaModel  # the first position is 2

    torch.manual_seed(0)
    m, ids = (
        RobertaModel(
            RobertaConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                vocab_size=vocab,
                max_position_embeddings=42,
                pad_token_id=1,
            )
        ).eval(),
        tokens(),
    )
    lively(PromptTuning(n), m)
    states = lambda **kw: m(ids, **kw).last_hidden_state
    assert (
        gap(
            [
                (states(attention_mask=torch.ones_like(ids)), states()),
                (states(position_ids=torch.arange(2, 14)[None]), states()),
            ]
        )
        < 1e-5
    )
    assert gap([(states(position_ids=torch.arange(3, 15)[None]), states())]) > 1e-3


@both_kinds
def test_a_given_cache_is_the_one_that_is_filled(method):
    from transformers import DynamicCache

    m, ids, mine = lively(method, make("Llama")), tokens(), DynamicCache()
    want = logits(m, ids)
    assert (
        gap([(logits(m, ids[:, :7], past_key_values=mine, use_cache=True), want[:, :7])]) < 1e-5
        and mine.get_seq_length() == 7
    )
    assert (
        gap([(logits(m, ids[:, 7:], past_key_values=mine, use_cache=False), want[:, 7:])]) < 1e-5
        and mine.get_seq_length() == 12
    )


def greedy(model, ids, k, **kwargs):
    for _ in range(k):
        ids = torch.cat([ids, logits(model, ids, use_cache=False, **kwargs)[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize(
    "name, method",
    [(name, kind(n)) for kind in (PromptTuning, PrefixTuning) for name in causal] + [("Mistral", PromptTuning(n))],
    ids=lambda o: o if isinstance(o, str) else type(o).__name__,
)
def test_generate_is_recomputation(name, method):
    m, ids = lively(method, make(name)), tokens()
    ones, want = torch.ones_like(ids), greedy(m, ids, 8)
    for way in (
        dict(),
        dict(use_cache=False),
        dict(attention_mask=ones),
        dict(attention_mask=ones, cache_implementation="dynamic"),
    ):
        assert torch.equal(m.generate(ids, **way, **say), want), way
    assert torch.equal(
        m.generate(inputs_embeds=m.get_input_embeddings()(ids), attention_mask=ones, **say), want[:, 12:]
    )
    pad = torch.tensor([[0] * 4] * 2)
    padded, mask = torch.cat([pad, ids], 1), torch.cat([pad, ones], 1)
    padded[1, :4], mask[1, :4] = 9, 1  # rows of different length
    if name == "Mistral":  # the window would not reach over the padding
        with pytest.raises(ValueError, match="left padding in a sliding window"):
            m.generate(padded, attention_mask=mask, **say)
        return
    out = m.generate(padded, attention_mask=mask, **say)
    assert torch.equal(out[:1, 4:], want[:1]) and torch.equal(out[1:], greedy(m, padded[1:], 8))


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
@both_kinds
def test_other_ways_to_generate(method, name):
    m, ids = lively(method, make(name)), tokens()
    ones = dict(attention_mask=torch.ones_like(ids))
    assert torch.equal(
        m.generate(ids, num_beams=3, **ones, **say), m.generate(ids, num_beams=3, use_cache=False, **ones, **say)
    )
    sample = lambda **kw: (torch.manual_seed(0), m.generate(ids, **ones, **(say | dict(do_sample=True)), **kw))[1]
    assert torch.equal(sample(), sample(use_cache=False))
    first = m.generate(ids, return_dict_in_generate=True, **ones, **(say | dict(max_new_tokens=4)))
    more = m.generate(
        first.sequences,
        past_key_values=first.past_key_values,
        attention_mask=torch.ones_like(first.sequences),
        **(say | dict(max_new_tokens=4)),
    )
    assert torch.equal(more, greedy(m, ids, 8))
    looked = m.generate(ids[:1], attention_mask=ones["attention_mask"][:1], prompt_lookup_num_tokens=3, **say)
    assert torch.equal(looked, greedy(m, ids[:1], 8))


@both_kinds
def test_a_cache_may_be_copied_and_repeated(method):
    m, ids = lively(method, make("Llama")), tokens(1)
    with torch.no_grad():
        cache = m(ids[:, :8], use_cache=True).past_key_values
    assert cache.get_seq_length() == 8
    want = logits(m, ids)
    for _ in range(2):
        again = copy.deepcopy(cache)
        again.batch_repeat_interleave(3)
        assert gap([(logits(m, ids[:, 8:].expand(3, -1), past_key_values=again)[1:2], want[:, 8:])]) < 1e-5
        assert again.get_seq_length() == 12 and cache.get_seq_length() == 8


@both_kinds
def test_choices_are_scored_as_without_a_cache(method, tmp_path):
    from ftbook.forgetting.choices import choice_scores

    m, prompts, choices = lively(method, make("Llama")), [[5] * 10 + [i, 7] for i in range(3)], [[8], [9, 4]]
    want = torch.tensor(
        [
            [
                sum(
                    float(logits(m, torch.tensor([p + c]))[0, len(p) - 1 + i].log_softmax(-1)[t])
                    for i, t in enumerate(c)
                )
                for c in choices
            ]
            for p in prompts
        ]
    )
    assert gap([(choice_scores(m, prompts, choices), want)]) < 1e-4


def test_t5_generates_and_masks():
    m, given = lively(PromptTuning(n), make("T5")), {k: v for k, v in inputs("T5").items() if k != "labels"}
    out, cur = m.generate(**given, **say), torch.zeros(2, 1, dtype=torch.long)
    for _ in range(8):
        cur = torch.cat([cur, logits(m, **given, decoder_input_ids=cur)[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, cur)
    plain = remove_(copy.deepcopy(m))
    changed = logits(m, **given, decoder_input_ids=cur) - logits(plain, **given, decoder_input_ids=cur)
    assert changed.abs().max() > 1e-3
    ids, mask = given["input_ids"].clone(), given["attention_mask"]
    ids[mask == 0] = 11  # what is masked does not matter
    assert (
        gap(
            [
                (
                    logits(m, input_ids=ids, attention_mask=mask, decoder_input_ids=cur),
                    logits(m, **given, decoder_input_ids=cur),
                )
            ]
        )
        < 1e-6
    )
    assert torch.equal(
        m.generate(**given, num_beams=2, **say), m.generate(**given, num_beams=2, use_cache=False, **say)
    )


def test_attention_and_nearest_words():
    m, ids = PrefixTuning(n).apply(make("Llama")), tokens(1)
    share = attention_by_position(m, ids)
    assert (
        share.shape == (2, n + 12)
        and gap([(share.sum(1), torch.ones(2))]) < 1e-5
        and m.training
        and m.config._attn_implementation == "sdpa"
    )
    assert attention_by_position(remove_(m), ids).shape == (2, 12)

    class Spell:
        decode = staticmethod(lambda ids: f"w{ids[0]}")

    assert [w for [(w, c)] in nearest_words(m.get_input_embeddings().weight[[4, 9]] * 3, m, Spell, 1)] == ["w4", "w9"]


def test_a_zero_prefix_takes_its_share():
    m, ids = make("Llama").eval(), tokens(1)
    plain = logits(m, ids)
    PrefixTuning(n, "zero").apply(m)
    share = attention_by_position(m, ids)
    assert (
        share[:, :n].min() > 0
        and gap([(share[:, :1].expand(-1, n), share[:, :n])]) < 1e-6
        and gap([(plain, logits(m, ids))]) > 1e-3
    )


# Training


@both_kinds
def test_finetune_and_evaluate(method, examples):
    from ftbook.training.evaluate import evaluate
    from ftbook.training.tune import finetune

    torch.manual_seed(0)
    m = method.apply(llama(initializer_range=0.3))
    alone = [
        float(m(torch.tensor([e.input_ids]), labels=torch.tensor([e.input_ids])).loss.detach()) * (len(e) - 1)
        for e in examples
    ]
    found = evaluate(m, examples)
    assert max(abs(a - b) for a, b in zip(alone, found.nats)) < 1e-3
    frozen = {k: v.clone() for k, v in m.named_parameters() if not v.requires_grad}
    assert m.config.use_cache
    finetune(m, examples, lr=0.05, batch_size=4, epochs=10, progress=False, patience=100, eval_examples=examples)
    assert (
        evaluate(m, examples).loss < found.loss - 0.1
        and all(torch.equal(v, m.get_parameter(k)) for k, v in frozen.items())
        and len(frozen) == len(list(m.parameters())) - 1
    )
    one, two = (
        finetune(
            method.apply(make("Llama")), examples, lr=0.01, batch_size=4, max_tokens=k, max_steps=3, progress=False
        ).history[-1]["loss"]
        for k in (8, 1000)
    )
    assert abs(one - two) < 1e-4  # in pieces or whole


@both_kinds
@pytest.mark.parametrize("mixed, dtype", [(True, torch.float32), (None, torch.bfloat16)])
def test_other_precisions(method, mixed, dtype, examples):
    from ftbook.training.tune import finetune

    want = finetune(method.apply(make("Llama")), examples, lr=0.05, batch_size=4, max_steps=6, progress=False)
    m = method.apply(make("Llama").to(dtype))
    assert {p.dtype for p in m.parameters() if p.requires_grad} == {torch.float32}
    run = finetune(m, examples, lr=0.05, batch_size=4, max_steps=6, mixed=mixed, progress=False)
    assert abs(run.history[-1]["loss"] - want.history[-1]["loss"]) < 0.05
    ids = tokens()
    assert m.eval().generate(ids, **say).shape == (2, 20) and logits(m, ids).dtype == dtype


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", causal + ["BERT", "T5"])
def test_prompts_go_with_checkpointing(name, reentrant):
    m = PromptTuning(n).apply(make(name))
    given = inputs(name) | (dict(labels=tokens()) if name != "T5" else {})
    m(**given).loss.backward()
    want = grads(m)
    m.zero_grad()
    m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    m(**given).loss.backward()
    assert gap((g, want[k]) for k, g in grads(m).items()) < 1e-6 and len(want) == len(grads(m)) == 1


@both_kinds
def test_training_does_not_depend_on_use_cache(method):
    m, found = method.apply(make("Llama")), []
    for use in (True, False):
        m.config.use_cache = use
        m.zero_grad()
        out = m(tokens(), labels=tokens())
        out.loss.backward()
        found.append((out.loss.item(), grads(m)[f"{CHILD}.embedding"]))
    assert (
        abs(found[0][0] - found[1][0]) < 1e-6
        and gap([(found[0][1], found[1][1])]) < 1e-6
        and found[0][1].abs().max() > 1e-6
    )
    assert out.past_key_values is None  # nobody asked for one


# Coming and going


@pytest.mark.parametrize(
    "kind, name, method, more",
    [c for c in cases if c[1] in ("Llama", "T5", "BERT")],
    ids=lambda o: o if isinstance(o, str) else None,
)
def test_no_trace_is_left(kind, name, method, more):
    m = make(name).eval()
    given, state = inputs(name), copy.deepcopy(m.state_dict())
    want, hooks = (
        logits(m, **given),
        lambda: [k for k, o in m.named_modules() if o._forward_hooks or o._forward_pre_hooks],
    )
    before, attributes = hooks(), set(vars(m))
    assert gap([(logits(method.apply(m), **given), want)]) > 1e-4 and m.ftbook_packs is False
    assert set(dict(m.named_children())) >= {CHILD} and not any(
        p.requires_grad for k, p in m.named_parameters() if CHILD not in k
    )
    remove_(m)
    assert (
        torch.equal(logits(m, **given), want)
        and hooks() == before
        and set(vars(m)) == attributes
        and not hasattr(m, CHILD)
    )
    assert all(p.requires_grad for p in m.parameters()) and all(
        torch.equal(v, state[k]) for k, v in m.state_dict().items()
    )


@both_kinds
def test_a_copy_has_tokens_of_its_own(method):
    m = lively(method, make("Llama"))
    want, other = logits(m, tokens()), copy.deepcopy(m)
    with torch.no_grad():
        other.get_submodule(CHILD).embedding.zero_()
    assert gap([(logits(other, tokens()), want)]) > 1e-3 and gap([(logits(m, tokens()), want)]) < 1e-6
    assert not hasattr(remove_(other), CHILD) and hasattr(m, CHILD)


@both_kinds
def test_twice_and_merged(method):
    m = method.apply(make("Llama"))
    with pytest.raises(ValueError, match="already has a method"):
        method.apply(m)
    with pytest.raises(ValueError, match="cannot be merged"):
        merge_(m)
    with pytest.raises(ValueError, match="not merged"):
        unmerge_(m)


def test_on_the_meta_device():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        m = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=vocab
            )
        )
    for method in (
        PromptTuning(n, "text", [1, 2]),
        PrefixTuning(n, "text", [1, 2]),
        PrefixTuning(n, projection=True),
        PTuning(n),
    ):
        assert all(p.is_meta for p in method.apply(m).parameters()) and trainable_summary(m).trained > 0
        remove_(m)


# Bad input


def test_what_the_facts_are_read_from():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, RobertaConfig, RobertaModel, OPTConfig, OPTModel

    assert [is_causal(transformer_of(make(k))) for k in ("Llama", "GPT-2", "BERT", "T5")] == [True, True, False, False]
    opt = OPTModel(
        OPTConfig(
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            vocab_size=vocab,
            max_position_embeddings=40,
        )
    )
    roberta = RobertaModel(
        RobertaConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=32,
            vocab_size=vocab,
            max_position_embeddings=42,
            pad_token_id=1,
        )
    )
    assert [
        position_limit(o) for o in (opt, roberta, make("GPT-2").transformer, make("Llama").model, make("T5").encoder)
    ] == [40, 40, 64, None, None]
    latent = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            hidden_size=32,
            intermediate_size=32,
            moe_intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            n_routed_experts=2,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=1,
            vocab_size=vocab,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            first_k_dense_replace=1,
        )
    )
    assert (
        obstacle(Case("prefix", latent.model, n))[0] == "an uneven cache"
        and obstacle(Case("prompt", latent.model, n)) is None
    )
    for m in (opt, roberta):
        before = m.eval()(tokens()).last_hidden_state
        assert PromptTuning(n).apply(m)(tokens()).last_hidden_state.shape == before.shape
        remove_(m)


@both_kinds
def test_packed_rows(method):
    from ftbook.data.examples import Example
    from ftbook.data.packs import pack

    m = method.apply(make("Llama"))
    packed = pack([Example([3, 4, 5], [False, True, True], 0), Example([6, 7], [False, True], 1)])[0]
    with pytest.raises(ValueError, match="packed rows.*pad instead"):
        m(**packed.kwargs())
    with pytest.raises(ValueError, match="packed rows"):
        m(packed.input_ids, position_ids=packed.position_ids)
    with pytest.raises(ValueError, match="packed rows"):
        m(packed.input_ids, lengths=[3, 2])
