"Prompt tuning and prefix tuning against peft, and against everything that counts tokens."

import copy, json

import pytest, torch
from safetensors.torch import load_file, save_file

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

vocab, n = 60, 5


def llama(**kw):
    from transformers import LlamaConfig, LlamaForCausalLM  # grouped queries

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=vocab,
            **kw,
        )
    )


def qwen():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=1,
            vocab_size=vocab,
        )
    )


def gpt2(positions=64):
    from transformers import GPT2Config, GPT2LMHeadModel  # learnt positions

    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=32,
            n_layer=2,
            n_head=4,
            vocab_size=vocab,
            n_positions=positions,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def bert(head="MaskedLM"):
    import transformers

    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=vocab,
        max_position_embeddings=48,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return getattr(transformers, f"BertFor{head}")(config)


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
            decoder_start_token_id=0,
        )
    )


def mistral():
    from transformers import MistralConfig, MistralForCausalLM  # a sliding window

    return MistralForCausalLM(
        MistralConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=vocab,
            sliding_window=8,
        )
    )


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=vocab))


small_models = {"Llama": llama, "Qwen2": qwen, "GPT-2": gpt2, "BERT": bert, "T5": t5}
causal = ["Llama", "Qwen2", "GPT-2"]


def make(name, seed=0):
    torch.manual_seed(seed)
    return (small_models | dict(Mistral=mistral, Mamba=mamba))[name]().train()


def tokens(rows=2, length=12, seed=1):
    return torch.randint(3, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def gap(pairs):
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


def logits(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs).logits


def lively(method, model):
    "With numbers in it that matter."
    method.apply(model)
    torch.manual_seed(7)
    for p in model.get_submodule(CHILD).parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model.eval()


tasks = {"BERT": "FEATURE_EXTRACTION", "T5": "SEQ_2_SEQ_LM"}


def config_of(kind, name, **more):
    import peft

    given = dict(task_type=tasks.get(name, "CAUSAL_LM"), num_virtual_tokens=n, **more)
    if name == "T5":
        given["num_transformer_submodules"] = more.get("num_transformer_submodules", 1)
    return getattr(
        peft, dict(prompt="PromptTuningConfig", prefix="PrefixTuningConfig", ptuning="PromptEncoderConfig")[kind]
    )(**given)


cases = [("prompt", name, PromptTuning(n), {}) for name in small_models]
cases += [("prefix", name, PrefixTuning(n), {}) for name in causal]
cases += [
    (
        "prefix",
        name,
        PrefixTuning(n, projection=True, encoder_hidden_size=24),
        dict(prefix_projection=True, encoder_hidden_size=24),
    )
    for name in causal
]
cases += [
    ("ptuning", name, PTuning(n, encoder_hidden_size=24), dict(encoder_hidden_size=24)) for name in ("Llama", "GPT-2")
]
labels_of_cases = [
    f"{name}: {type(m).__name__}{', projected' if getattr(m, 'projection', False) else ''}" for _, name, m, _ in cases
]
every_case = pytest.mark.parametrize("kind, name, method, more", cases, ids=labels_of_cases)
both_kinds = pytest.mark.parametrize("method", [PromptTuning(n), PrefixTuning(n)], ids=["prompt", "prefix"])


def twins(kind, name, method, more, model=None):
    "The same numbers in our form and in peft's."
    import peft

    a, b = (copy.deepcopy(model) if model else make(name) for _ in range(2))
    method.apply(a)
    b = peft.get_peft_model(b, config_of(kind, name, **more))
    pairs = list(zip(*([p for p in m.parameters() if p.requires_grad] for m in (a, b))))
    assert [p.shape for p, _ in pairs] == [q.shape for _, q in pairs] and len(pairs) == len(a.ftbook_added)
    torch.manual_seed(3)
    for p, q in pairs:
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
        q.data.copy_(p.data)
    return a, b, pairs


def inputs(name, seed=1, size=vocab):
    ids = tokens(seed=seed) % size
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0  # padding on the right
    return dict(input_ids=ids, attention_mask=mask) | (dict(labels=tokens(2, 7, seed + 50)) if name == "T5" else {})


def real_logits(model, given):
    "The logits of real tokens: peft gives more."
    out = model(**given).logits
    return out[:, -(given.get("labels", given["input_ids"])).shape[1] :]


def loss_of(out, given, name):
    """peft counts the first real token's label, which the last virtual token predicts; ours, like the plain model, does
    not."""
    targets = given["labels"] if name == "T5" else given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    if name in ("T5", "BERT"):
        return torch.nn.functional.cross_entropy(out.flatten(0, 1), targets.flatten())
    return torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


def compare(a, b, pairs, name, steps=10, lr=1e-3, size=vocab):
    "Largest differences of logits at real tokens, of gradients and, after `steps` of AdamW, of weights."
    optimizers, found = [torch.optim.AdamW([o[i] for o in pairs], lr=lr) for i in (0, 1)], {}
    for step in range(max(steps, 1)):
        given, outs = inputs(name, step + 1, size), []
        for m, o in zip((a, b), optimizers):
            outs.append(real_logits(m, given))
            o.zero_grad()
            loss_of(outs[-1], given, name).backward()
        if step == 0:
            on = given["attention_mask"].bool() if name != "T5" else slice(None)
            found = dict(logits=gap([(outs[0][on], outs[1][on])]), gradients=gap((p.grad, q.grad) for p, q in pairs))
            assert all(p.grad.abs().max() > 1e-7 for p, _ in pairs), "a comparison of zeros proves nothing"
        if steps:
            [o.step() for o in optimizers]
    return found | (dict(weights=gap(pairs)) if steps else {})


# Same as the library


def parity_rows():
    "(what, largest differences) of soft prompts against peft."
    from ftbook.models.load import load_model

    rows = [(label, compare(*twins(*case), case[1])) for label, case in zip(labels_of_cases, cases)]
    shipped = load_model("smollm2-135m", dtype="float32", device="cpu", attention="eager")[0]
    for kind, method in dict(prompt=PromptTuning(n), prefix=PrefixTuning(n)).items():
        rows.append(
            (
                f"smollm2-135m: {type(method).__name__}",
                compare(*twins(kind, "Llama", method, {}, shipped), "Llama", steps=0),
            )
        )
    return rows


@every_case
def test_counts_like_peft(kind, name, method, more):
    a, b, _ = twins(kind, name, method, more)
    assert b.get_nb_trainable_parameters() == (trainable_summary(a).trained, trainable_summary(a).total)


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


@pytest.mark.parametrize(
    "how, theirs", [(dict(), {}), (dict(init="vocabulary"), dict(prompt_tuning_init="SAMPLE_VOCAB"))]
)
def test_prompt_begins_as_in_peft(how, theirs):
    import peft

    a, b = PromptTuning(n, seed=5, **how).apply(make("Llama")), make("Llama")
    torch.manual_seed(5)
    b = peft.get_peft_model(b, config_of("prompt", "Llama", **theirs))
    assert torch.equal(a.get_submodule(CHILD).embedding, b.prompt_encoder["default"].embedding.weight)


@pytest.mark.parametrize(
    "how, theirs",
    [
        (dict(), {}),
        (dict(init="zero"), dict(init_weights="zero")),
        (dict(projection=True), dict(prefix_projection=True)),
        (
            dict(projection=True, init="zero", encoder_hidden_size=9),
            dict(prefix_projection=True, init_weights="zero", encoder_hidden_size=9),
        ),
    ],
)
def test_prefix_begins_as_in_peft(how, theirs):
    import peft

    a, b = PrefixTuning(n, seed=5, **how).apply(make("Llama")), make("Llama")
    torch.manual_seed(5)
    b = peft.get_peft_model(b, config_of("prefix", "Llama", **theirs))
    pairs = list(zip(*([p for p in m.parameters() if p.requires_grad] for m in (a, b))))
    assert all(torch.equal(p, q) for p, q in pairs) and len(pairs) == len(a.ftbook_added)


def test_text_begins_as_in_peft(tmp_path):
    import peft
    from ftbook.models.shipped import model_folder
    from tiny import save_tiny_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, text = save_tiny_model(tmp_path / "model"), "Is it good or bad?"
    tokenizer, load = AutoTokenizer.from_pretrained(folder), lambda: AutoModelForCausalLM.from_pretrained(folder)
    for size in (3, 20):  # cut, and repeated
        a = PromptTuning(size, "text", text, tokenizer).apply(load())
        b = peft.get_peft_model(
            load(),
            peft.PromptTuningConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=size,
                prompt_tuning_init="TEXT",
                prompt_tuning_init_text=text,
                tokenizer_name_or_path=str(folder),
            ),
        )
        assert torch.equal(a.get_submodule(CHILD).embedding, b.prompt_encoder["default"].embedding.weight)
    a = PrefixTuning(4, "text", text, tokenizer).apply(load())
    b = peft.get_peft_model(load(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    peft.initialize_kv_prefix_from_text(b, tokenizer, text=text, use_chat_template=False)
    assert gap([(a.get_submodule(CHILD).embedding, b.prompt_encoder["default"].embedding.weight)]) < 1e-6


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


@every_case
def test_adapters_cross_the_border(kind, name, method, more, tmp_path):
    import peft

    a, b, _ = twins(kind, name, method, more)
    a.eval(), b.eval()
    save_adapter(a, tmp_path / "ours")
    b.save_pretrained(tmp_path / "theirs")
    there, here = (
        peft.PeftModel.from_pretrained(make(name), tmp_path / "ours").eval(),
        load_adapter(make(name), tmp_path / "theirs").eval(),
    )
    again = load_adapter(make(name), tmp_path / "ours").eval()
    given = inputs(name) | (dict(attention_mask=torch.ones(2, 12, dtype=torch.long)) if name != "T5" else {})
    want = real_logits(b, given)
    assert gap((real_logits(m, given), want) for m in (a, there, here, again)) < 1e-5
    mine, his = (json.loads((tmp_path / o / "adapter_config.json").read_text()) for o in ("ours", "theirs"))
    same = (
        "task_type",
        "num_virtual_tokens",
        "token_dim",
        "num_attention_heads",
        "num_layers",
        "num_transformer_submodules",
        "inference_mode",
        "modules_to_save",
    )
    assert {k: mine[k] for k in same} == {k: his[k] for k in same}
    assert list(load_file(tmp_path / "ours" / "adapter_model.safetensors")) == ["prompt_embeddings"]
    if kind != "ptuning":
        assert mine["peft_type"] == his["peft_type"] and set(mine) <= set(his)


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


def test_two_sets_of_tokens_for_an_encoder_with_a_decoder(tmp_path):
    import peft

    b = peft.get_peft_model(make("T5"), config_of("prompt", "T5", num_transformer_submodules=2)).eval()
    b.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"].shape == (2 * n, 32)
    a = load_adapter(make("T5"), tmp_path).eval()
    assert gap([(real_logits(a, inputs("T5")), real_logits(b, inputs("T5")))]) < 1e-5
    peft.get_peft_model(
        make("T5"), peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=n)
    ).save_pretrained(tmp_path / "prefix")
    with pytest.raises(ValueError, match="before the decoder"):
        load_adapter(make("T5"), tmp_path / "prefix")


@pytest.mark.parametrize("head, task", [("SequenceClassification", "SEQ_CLS"), ("TokenClassification", "TOKEN_CLS")])
def test_a_head_beside_the_prompt(head, task, tmp_path):
    import peft

    model = lambda: (torch.manual_seed(0), bert(head))[1].eval()
    b = peft.get_peft_model(model(), peft.PromptTuningConfig(task_type=task, num_virtual_tokens=n)).eval()
    a = PromptTuning(n, modules_to_save=["classifier"]).apply(model())
    for m in (a, b):
        torch.manual_seed(2)
        for p in m.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p)
    given = dict(
        input_ids=tokens(),
        attention_mask=torch.ones(2, 12, dtype=torch.long),
        token_type_ids=torch.zeros(2, 12, dtype=torch.long),
    )
    save_adapter(a, tmp_path / "ours")
    b.save_pretrained(tmp_path / "theirs")
    there, here = (
        peft.PeftModel.from_pretrained(model(), tmp_path / "ours").eval(),
        load_adapter(model(), tmp_path / "theirs").eval(),
    )
    cut = lambda t: t[:, -12:] if task == "TOKEN_CLS" else t
    assert (
        gap([(logits(a, **given), cut(logits(there, **given))), (logits(here, **given), cut(logits(b, **given)))])
        < 1e-5
    )
    assert trainable_summary(a).trained == n * 32 + 2 * 32 + 2
    remove_(a)
    assert "whole" not in str(list(dict(a.named_parameters())))


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


@both_kinds
def test_padding_on_the_left_moves_the_text_in_peft(method):
    kind = "prompt" if type(method) is PromptTuning else "prefix"
    a, b, _ = twins(kind, "Llama", method, {})
    ids, pad = tokens(1), torch.zeros(1, 6, dtype=torch.long)
    padded, mask = torch.cat([pad, ids], 1), torch.cat([pad, torch.ones_like(ids)], 1)
    moved = lambda m: gap(
        [
            (
                m(input_ids=padded, attention_mask=mask).logits[:, -12:],
                m(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -12:],
            )
        ]
    )
    assert moved(a) < 1e-5 < 1e-4 < moved(b)


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


say = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)


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


@pytest.fixture(scope="module")
def examples():
    from ftbook.data.examples import Example

    ids = [[3 + (i * j) % 50 for j in range(4 + i % 5)] for i in range(1, 13)]
    return [Example(o, [False] + [True] * (len(o) - 1), i) for i, o in enumerate(ids)]


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
    run = finetune(m, examples, lr=0.05, batch_size=4, epochs=10, progress=False, patience=100, eval_examples=examples)
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


def grads(m):
    return {k: p.grad.clone() for k, p in m.named_parameters() if p.grad is not None}


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
def test_a_call_that_failed_leaves_nothing_behind(method, monkeypatch):
    m = method.apply(make("Llama"))
    want, last = m(tokens()).logits.detach(), m.model.layers[1]
    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="out of memory"):
        broken.setattr(last, "forward", lambda *a, **kw: (_ for _ in ()).throw(RuntimeError("out of memory")))
        m(tokens())
    for model in (copy.deepcopy(m), m):
        assert gap([(model(tokens()).logits, want)]) < 1e-6


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
