"Small models for adapters, kinds of adapters, and what a refusal must leave alone."

import copy, json

import pytest, torch
from torch import nn

from ftbook.methods import targets as methods_targets
from ftbook.methods.bottleneck import KINDS
from ftbook.methods.bitfit import BitFit
from ftbook.methods.package_adapters import load_from_adapters, save_for_adapters
from ftbook.methods.files import load_adapter, save_adapter
from ftbook.methods.parts import parts_of
from tiny import SMALL, VOCAB as vocab, gap, seeded, small_llama as llama, small_t5, snapshot

d, heads = 32, 4

# Small models


def distilbert():
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    return DistilBertForMaskedLM(
        DistilBertConfig(
            dim=d, n_layers=2, n_heads=heads, hidden_dim=64, vocab_size=vocab, dropout=0.0, attention_dropout=0.0
        )
    )


def bart():
    from transformers import BartConfig, BartForConditionalGeneration  # not in LAYOUTS

    return BartForConditionalGeneration(
        BartConfig(
            d_model=d,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            vocab_size=vocab,
            max_position_embeddings=64,
            dropout=0.0,
            attention_dropout=0.0,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=1,
            forced_eos_token_id=1,
        )
    )


small_models = SMALL | {
    "DistilBERT": distilbert,
    "T5": lambda: small_t5(tie_word_embeddings=False, initializer_factor=0.3),
}
every_model, every_kind = pytest.mark.parametrize("name", small_models), pytest.mark.parametrize("kind", KINDS)


def make(name, seed=0):
    return seeded(small_models[name], seed)


def batch(seed=1, n=2, length=8):
    ids = torch.randint(2, vocab, (n, length), generator=torch.Generator().manual_seed(seed))
    return dict(input_ids=ids, labels=ids)


def busy(model, std=0.1, mean=0.0, seed=1):
    "Give every new parameter a random value."
    torch.manual_seed(seed)
    for n in model.ftbook_added:
        nn.init.normal_(model.get_parameter(n), mean, std)
    return model


def logits(model, seed=1):
    with torch.no_grad():
        return model(**batch(seed)).logits


def untouched(model, before):
    state, kinds, grads = snapshot(model)
    return (
        all(torch.equal(v, before[0][k]) for k, v in state.items())
        and (kinds, grads) == before[1:]
        and not hasattr(model, "ftbook_method")
        and not hooks(model)
    )


def hooks(model):
    return [n for n, m in model.named_modules() if m._forward_pre_hooks or m._forward_hooks]


# Bad input


def refused(load, folder, model, *said, error=ValueError):
    before = snapshot(model)
    with pytest.raises(error) as e:
        load(model, folder)
    assert all(o in str(e.value) for o in said), str(e.value)
    assert untouched(model, before)


borders = {
    "ftbook": (save_adapter, load_adapter, "adapter_model.safetensors"),
    "adapters": (save_for_adapters, load_from_adapters, "adapter.safetensors"),
}


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    about = json.loads(path.read_text())
    about["config"] |= changes
    path.write_text(json.dumps(about))


# (IA)3 and BitFit against peft

peft_models = ["Llama", "Qwen2", "GPT-2", "BERT", "T5"]


def biases_of(name, norms=False):
    """The model with BitFit, the same with its own biases thawed, and the pairs: offset and bias.

    The frozen biases are not zero.
    """
    base = make(name)
    with torch.no_grad():
        for n in methods_targets.find_modules(base):
            if (b := base.get_submodule(n).bias) is not None:
                b.normal_(std=0.1)
    ours, plain = BitFit(norms=norms).apply(copy.deepcopy(base)), base.requires_grad_(False)
    busy(ours)
    pairs = []
    for n, part in parts_of(ours).items():
        bias = plain.get_submodule(n).bias.requires_grad_()
        bias.data += part.offset.data
        pairs.append((part, bias))
    return ours, plain, pairs
