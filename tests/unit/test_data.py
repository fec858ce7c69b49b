"Rows, templates, masks and packs, on made-up rows, made-up templates and models of several families."

import csv, io, json

import pytest, torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils

from ftbook.data import attention as data_attention
from ftbook.data.examples import IGNORE, Example, prompt_ids
from ftbook.data.rows import assistant, user
from ftbook.data.encoding import to_example
from ftbook.data.isolate import isolate_
from ftbook.data.layouts import laid, layout_of
from ftbook.data.packs import length_batches, pack, pad
from ftbook.data.read import read_rows
from ftbook.data.viewer import show_mask
from cases.data import chatml, families, model, plain_llama, small, tokenizer_of, words

lengths = st.lists(st.integers(2, 40), min_size=1, max_size=60)
templates = {
    "chatml": chatml,
    "system message by default": "{% if not messages or messages[0]['role'] != 'system' %}<s>system\nBe kind.<e>\n{% endif %}"
    + chatml,
    "no line break": chatml.replace("<e>\n", "<e>"),
    "begin of text": "<b>" + chatml,
    "plain words": (
        "{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }}{% if m['role'] == 'assistant' %}<e>{% "
        "endif %}\n\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant: {% endif %}"
    ),
    "other end": chatml.replace("<e>", "<turn>"),
}


def example(n, index=None, at=4):
    return Example([(i * 7 + (index or 0)) % 90 + at for i in range(n)], [False] + [True] * (n - 1), 1, index=index)


def said(e, tk):
    return tk.decode([t for t, on in zip(e.input_ids, e.trained) if on])


# Rows and files


@given(st.lists(st.fixed_dictionaries(dict(prompt=words, completion=words)), min_size=1, max_size=8))
def test_every_format_reads_the_same(tmp_path_factory, rows):
    folder, table = tmp_path_factory.mktemp("rows"), io.StringIO(newline="")
    writer = csv.DictWriter(table, ["prompt", "completion"])
    writer.writeheader()
    writer.writerows(rows)
    files = {
        "a.jsonl": "\n".join(json.dumps(r, ensure_ascii=False) for r in rows),
        "a.json": "\ufeff" + json.dumps(rows),
        "a.csv": table.getvalue(),
    }
    for name, text in files.items():
        (folder / name).write_bytes(text.encode())
        assert read_rows(folder / name) == rows


# Templates and masks


@pytest.mark.parametrize("name", templates)
@given(prompt=words, completion=words)
def test_training_begins_with_what_use_begins_with(name, prompt, completion):
    tk = tokenizer_of(templates[name])
    row = dict(prompt=[user(prompt)], completion=[assistant(completion)])
    e = to_example(row, tk)
    assert e.input_ids == tk.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]
    assert (
        e.input_ids[: e.n_prompt]
        == prompt_ids(row, tk)
        == tk.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    )
    end = "<turn>" if name == "other end" else "<e>"
    assert said(e, tk) == completion + end and not any(e.trained[: e.n_prompt])
    assert to_example(dict(messages=row["prompt"] + row["completion"]), tk) == e


@pytest.mark.parametrize("name", templates)
@given(turns=st.lists(st.tuples(words, words), min_size=1, max_size=4))
def test_every_answer_is_trained_and_no_question(name, turns):
    tk = tokenizer_of(templates[name])
    talk = dict(messages=[m for q, a in turns for m in (user(q), assistant(a))])
    end = "<turn>" if name == "other end" else "<e>"
    assert said(to_example(talk, tk, loss_on="assistant"), tk) == "".join(a + end for _, a in turns)
    assert said(to_example(talk, tk), tk) == turns[-1][1] + end
    everything = to_example(talk, tk, loss_on="all")
    assert everything.trained == [False] + [True] * (len(everything) - 1)


@given(prompt=words, completion=words)
def test_plain_strings_end_too(prompt, completion):
    tk = tokenizer_of(None)
    e = to_example(dict(prompt=prompt, completion=completion), tk)
    assert e.input_ids[: e.n_prompt] == prompt_ids(prompt, tk) and said(e, tk) == completion + "<e>"
    assert said(to_example(dict(text=completion), tk), tk) == tk.decode(tk(completion)["input_ids"][1:]) + "<e>"


def test_special_words_within_an_answer_do_not_end_it():
    tk = tokenizer_of(chatml)
    e = to_example(dict(prompt=[user("a")], completion=[assistant("x<e>y")]), tk)
    assert said(e, tk) == "x<e>y<e>"


def test_the_picture_counts_and_escapes():
    tk = tokenizer_of(chatml)
    e = to_example(dict(prompt=[user("<script>")], completion=[assistant("ok")]), tk)
    html = show_mask(e, tk, pad_to=len(e) + 3).html
    assert (
        "<script" not in html
        and "&lt;" in html
        and "2 trained" in html
        and "1 end of turn, trained" in html
        and "3 padding" in html
    )


# Batches and packs


@given(lengths, st.integers(40, 200))
def test_a_pack_keeps_every_token_once_and_in_order(sizes, max_tokens):
    examples = [example(n, i) for i, n in enumerate(sizes)]
    packs = pack(examples, max_tokens)
    assert [t for p in packs for t in p.input_ids[0].tolist()] == [t for e in examples for t in e.input_ids]
    assert [n for p in packs for n in p.lengths] == sizes and all(
        sum(p.lengths) == p.input_ids.shape[1] <= max_tokens for p in packs
    )
    assert sum(p.n_targets for p in packs) == sum(e.n_targets for e in examples)
    for p in packs:
        assert p.position_ids[0].tolist() == [i for n in p.lengths for i in range(n)]
        assert p.kwargs()["cu_seq_lens_q"].diff().tolist() == p.lengths
        starts = torch.tensor([0, *p.lengths[:-1]]).cumsum(0)
        assert (p.labels[0, starts] == IGNORE).all()


def test_a_pack_never_trains_across_a_border():
    greedy = Example([5, 6, 7], [True, True, True])
    assert pack([greedy, greedy])[0].labels.tolist() == [[IGNORE, 6, 7, IGNORE, 6, 7]]


@given(lengths, st.integers(1, 20), st.integers(0, 5), st.integers(0, 5))
def test_an_epoch_meets_each_example_once(sizes, batch_size, seed, epoch):
    examples = [example(n, i) for i, n in enumerate(sizes)]
    batches = length_batches(examples, batch_size, seed=seed, epoch=epoch)
    assert sorted(e.index for b in batches for e in b) == list(range(len(examples)))
    assert sorted(map(len, batches))[1:] == [batch_size] * (len(batches) - 1)
    assert batches == length_batches(examples, batch_size, seed=seed, epoch=epoch)


@given(lengths)
def test_padding_hides_nothing_else(sizes):
    examples = [example(n, i) for i, n in enumerate(sizes)]
    box = pad(examples, pad_id=5)
    assert (box["labels"] != IGNORE).sum(1).tolist() == [e.n_targets for e in examples] and box["attention_mask"].sum(
        1
    ).tolist() == sizes


# Isolation, in families that differ in their attention

es = [example(n, i) for i, n in enumerate([9, 3, 14, 2, 6])]


def one_by_one(model, examples):
    return torch.cat([model(torch.tensor([e.input_ids]), use_cache=False).logits for e in examples], 1)


def test_a_pack_is_as_if_each_were_alone(model, monkeypatch):
    b = pack(es)[0]
    want = one_by_one(model, es)
    leaky = model(
        input_ids=b.input_ids, position_ids=b.position_ids, attention_mask=torch.ones_like(b.input_ids), use_cache=False
    ).logits
    isolate_(model)
    monkeypatch.setattr(masking_utils, "sdpa_mask", lambda **kw: pytest.fail("a mask over the pack was drawn"))
    got = model(**b.kwargs()).logits
    assert (got - want).abs().max() < 1e-9 * want.abs().max()
    assert (leaky - want).abs().max() > 1e-3 * want.abs().max()
    no_list = {k: v for k, v in b.kwargs().items() if k != "lengths"}
    assert torch.equal(model(**no_list).logits, got)


def test_gradients_of_a_pack_are_sums(model):
    isolate_(model)
    b, parameters = pack(es)[0], [p for p in model.parameters() if p.requires_grad]

    def grads(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, materialize_grads=True)])

    def loss(logits, labels):
        return F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")

    want = grads(
        sum(loss(model(torch.tensor([e.input_ids]), use_cache=False).logits, torch.tensor([e.labels])) for e in es)
    )
    got = grads(loss(model(**b.kwargs()).logits, b.labels))
    assert (got - want).norm() < 1e-7 * want.norm()  # some families keep their norms in single precision


def test_all_else_works_as_before(model):
    box, b = pad(es, 1), pack(es)[0]

    def others():
        padded = model(**{k: box[k] for k in ("input_ids", "attention_mask")}).logits[box["attention_mask"].bool()]
        unasked = model(input_ids=b.input_ids, position_ids=b.position_ids, use_cache=False).logits
        made = model.generate(
            box["input_ids"][:1, :5],
            max_new_tokens=9,
            do_sample=False,
            pad_token_id=1,
            attention_mask=torch.ones(1, 5, dtype=torch.long),
        )
        return padded, unasked, made

    before = others()
    isolate_(model)
    for x, y in zip(before, others()):
        assert torch.allclose(x, y, atol=1e-9)


def test_gradient_checkpointing_hands_the_lengths_on():
    torch.manual_seed(0)
    model = isolate_(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **small)).double().train())
    b = pack(es)[0]

    def grad():
        model.zero_grad()
        F.cross_entropy(model(**b.kwargs()).logits[0, :-1], b.labels[0, 1:]).backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    want = grad()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert torch.equal(grad(), want)
    with pytest.raises(ValueError, match="a pack is one row: the examples have 3 tokens"):
        model(**b.kwargs() | dict(lengths=[3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_trial_packs_where_attention_is_all(dtype):
    for kind, given in families.items():
        shape = dict(vocab_size=128, **given) if kind == "gpt2" else small | given
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape)).to(dtype)
        assert layout_of(model).way == "packed", kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_trial_finds_a_leak_below_rounding(dtype):
    "A convolution whose neighbours move logits by less than bfloat16's rounding."
    torch.manual_seed(0)
    shape = dict(vocab_size=128, hidden_size=32, block_ff_dim=48, num_attention_heads=4, num_key_value_heads=2)
    config = AutoConfig.for_model("lfm2", num_hidden_layers=2, layer_types=["conv", "full_attention"], **shape)
    found = layout_of(AutoModelForCausalLM.from_config(config).to(dtype))
    assert found.way == "right" and not found.packs
    assert "in a pack a row reads its neighbour" in str(found)


def test_the_trial_gives_the_model_back_and_is_made_once(monkeypatch):
    model = plain_llama(vocab_size=131).train()
    model.model.layers[1].eval()
    before, draws = {n: m.training for n, m in model.named_modules()}, torch.random.get_rng_state()
    calls = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    assert layout_of(model).packs and len(calls) == 3
    assert {n: m.training for n, m in model.named_modules()} == before
    assert torch.equal(torch.random.get_rng_state(), draws)
    assert model.config._attn_implementation == "sdpa" and model.config.use_cache
    assert all(p.grad is None for p in model.parameters()) and not model.model.embed_tokens._forward_hooks
    assert layout_of(model).packs and len(calls) == 3
    again = plain_llama(vocab_size=132)
    with torch.inference_mode():
        assert layout_of(again).packs


def last_slot(module, args, out):
    return out + out[:, -1:]


def mean_of_slots(module, args, out):
    return out + out.mean(1, keepdim=True)


@pytest.mark.parametrize("mix, way, vocab_size", [(last_slot, "left", 133), (mean_of_slots, "alone", 134)])
def test_where_padding_is_wrong(mix, way, vocab_size):
    model = plain_llama(vocab_size=vocab_size)
    model.model.norm.register_forward_hook(mix)
    found = layout_of(model)
    assert found.way == way
    assert "padded on the right a row" in found.why and ("padded on the left a row" in found.why) == (way == "alone")
    few = [example(n, i) for i, n in enumerate([4, 9, 6])]
    got = [
        model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits[b["attention_mask"].bool()]
        for b in laid(pad(few), way)
    ]
    want = one_by_one(model, few)[0]
    assert (torch.cat(got) - want).abs().max() < 1e-5 * want.abs().max()


def test_the_ways_to_lay_rows_keep_every_target():
    few = [example(n, i) for i, n in enumerate([4, 9, 1, 6])]
    few[1].trained[0] = True  # the first token of a row is no target, wherever its row begins
    box = pad(few)

    def targets(way):
        return [t for b in laid(box, way) for t in b["labels"][:, 1:][b["labels"][:, 1:] != IGNORE].tolist()]

    assert targets("left") == targets("alone") == targets("right")
    assert len(targets("right")) == sum(len(e) - 1 for e in few)


def test_a_shared_opening_leaves_every_row_something():
    "Rows that are asked about nothing, or that end where the others go on, keep a token of their own."
    rows = [Example(list(range(10)), [False] * 10), Example(list(range(10)) + [50], [False] * 10 + [True])]
    (packed,) = pack(rows, share=True)
    assert packed.prefix == 9 and packed.lengths == [9, 1, 2] and packed.input_ids[0].tolist() == [*range(9), 9, 9, 50]


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_a_gpu_is_attention(kv_heads, dtype, masked):
    "Heads that share keys and heads that were given copies: the same numbers and gradients as from a formula."
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 9, 8, dtype=dtype).requires_grad_() for heads in (6, kv_heads, kv_heads))
    mask = torch.ones(9, 9, dtype=torch.bool).tril() & torch.ones(9, 9, dtype=torch.bool).triu(-3) if masked else None
    out = data_attention.gpu_attention(q, k, v, mask)
    K, V = (t.repeat_interleave(6 // kv_heads, 1).float() for t in (k, v))
    scores = (q.float() @ K.transpose(2, 3) / 8**0.5).masked_fill(
        ~(mask if masked else torch.ones(9, 9, dtype=torch.bool).tril()), -torch.inf
    )
    want = scores.softmax(-1) @ V
    near = dict(atol=1e-5, rtol=1e-5) if dtype == torch.float32 else dict(atol=2e-2, rtol=2e-2)
    assert torch.allclose(out.float(), want, **near) and out.dtype == dtype
    for a, b in zip(
        torch.autograd.grad(out.float().square().sum(), (q, k, v)), torch.autograd.grad(want.square().sum(), (q, k, v))
    ):
        assert torch.allclose(a.float(), b.float(), atol=10 * near["atol"], rtol=10 * near["rtol"])


@pytest.mark.parametrize(
    "dtype, masked, autocast, capability, shares",
    [
        (torch.bfloat16, False, None, (9, 0), True),
        (torch.bfloat16, True, None, (9, 0), False),
        (torch.float32, False, None, (9, 0), False),
        (torch.float32, False, torch.bfloat16, (9, 0), True),
        (torch.float16, False, None, (7, 5), False),
        (torch.float16, False, None, (8, 0), True),
    ],
)
def test_heads_share_keys_only_in_the_flash_kernel(monkeypatch, dtype, masked, autocast, capability, shares):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: autocast is not None)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: autocast)
    query = type("OnGPU", (), dict(device=torch.device("cuda"), dtype=dtype))()
    assert data_attention._takes_flash(query, torch.ones(1) if masked else None) == shares


def test_cudnn_attention_comes_back_after_an_error():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with pytest.raises(KeyError):
        with data_attention.without_cudnn_attention():
            assert not torch.backends.cuda.cudnn_sdp_enabled()
            raise KeyError
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
