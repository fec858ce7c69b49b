"Small models to merge, and configurations that merge them."

import shutil

import pytest, torch
from safetensors.torch import load_file

from ftbook.merging import config as merging_config
from ftbook.merging.recipes import RECIPES

NAMES = "base", "red", "blue", "green"

# Small models


def config(**kw):
    from transformers import LlamaConfig

    return LlamaConfig(
        **dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=90,
            tie_word_embeddings=True,
            initializer_range=0.1,
        )
        | kw
    )


def llama(seed, **kw):
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model, g = LlamaForCausalLM(config(**kw)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * bool(seed) * torch.randn(p.shape, generator=g))
    return model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    "Four models; one of them is sharded."
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(NAMES):
        llama(seed).save_pretrained(folder / name, max_shard_size="50KB" if name == "blue" else "1GB")
    return folder


@pytest.fixture
def models(source, tmp_path):
    "A copy that a test may spoil."
    shutil.copytree(source, tmp_path / "m")
    return tmp_path / "m"


def tensors(folder):
    return {k: t for f in folder.glob("*.safetensors") for k, t in load_file(f).items()}


def recipe_for(folder, method="ties", names=NAMES[1:], base="base", **kw):
    "A configuration; keywords beside the known top level are parameters of every model."
    top = {k: kw.pop(k) for k in list(kw) if k in merging_config._TOP}
    given = {"weight": 1.0} | kw if "weight" in RECIPES[method].each else kw
    return (
        dict(
            merge_method=method,
            models=[dict(model=str(folder / n), parameters=dict(given)) for n in names],
            **({"base_model": str(folder / base)} if base else {}),
            dtype="float32",
        )
        | top
    )


def gap(a, b):
    return max(float((t - b[k]).abs().max()) for k, t in a.items())


# Vocabularies and tied heads


def words(folder, tokens, added=()):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [])))
    made.add_tokens(list(added))
    made.save_pretrained(folder)


# Adapters


def adapter(folder, base, seed, save=True, **kw):
    import peft

    torch.manual_seed(seed)
    model = peft.get_peft_model(
        base, peft.LoraConfig(**dict(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]) | kw)
    )
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    if save:
        model.save_pretrained(folder)
    return model
