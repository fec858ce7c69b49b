"Small models with soft prompts, beside their twins in peft."

import pytest, torch

from ftbook.methods.soft_method import CHILD
from ftbook.methods.prefix_tuning import PrefixTuning
from ftbook.methods.prompt_tuning import PromptTuning
from ftbook.methods.p_tuning import PTuning
from tiny import SMALL, VOCAB as vocab, decoder, gap, grads_of as grads, seeded
from tiny import small_bert, small_llama as llama, small_qwen, small_t5


def bert(head="MaskedLM"):
    return small_bert(head=head, max_position_embeddings=48)


def mistral():
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**decoder(32, sliding_window=8)))


n = 5


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=vocab))


small_models = SMALL | {
    "Qwen2": lambda: small_qwen(num_hidden_layers=3, num_key_value_heads=1),
    "BERT": bert,
    "T5": lambda: small_t5(feed_forward_proj="relu"),
}
causal = ["Llama", "Qwen2", "GPT-2"]


def make(name, seed=0):
    return seeded((small_models | dict(Mistral=mistral, Mamba=mamba))[name], seed)


def tokens(rows=2, length=12, seed=1):
    return torch.randint(3, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


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
both_kinds = pytest.mark.parametrize("method", [PromptTuning(n), PrefixTuning(n)], ids=["prompt", "prefix"])


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


# What the caller sees

say = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)

# Training


@pytest.fixture(scope="module")
def examples():
    from ftbook.data.examples import Example

    ids = [[3 + (i * j) % 50 for j in range(4 + i % 5)] for i in range(1, 13)]
    return [Example(o, [False] + [True] * (len(o) - 1), i) for i, o in enumerate(ids)]
