"A model, a file and a configuration so small that a whole run takes about a second."

import json

import torch, yaml

from ftbook.models.shipped import model_folder


def seeded(build, seed=0):
    "A random model that `build` makes, always the same, in training."
    torch.manual_seed(seed)
    return build().train()


def random_batch(vocab, seed=1, n=2, length=12):
    "Rows of random ids, which are their own labels."
    ids = torch.randint(0, vocab, (n, length), generator=torch.Generator().manual_seed(seed))
    return dict(input_ids=ids, labels=ids)


def save_tiny_model(folder):
    "Save a small random model of the Llama family, with the tokenizer and the template of the shipped one."
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
    ).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder("smollm2-135m"))
    tokenizer.model_max_length = 256
    tokenizer.save_pretrained(folder)
    return folder


def save_siblings(folder, names=("base", "red", "blue", "grey")):
    "Save one random Llama and others that differ from it by a little noise, without tokenizers, one folder a name."
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    for seed, name in enumerate(names):
        model = seeded(lambda: LlamaForCausalLM(config))
        noise = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.data += 0.02 * bool(seed) * torch.randn(p.shape, generator=noise)
        model.save_pretrained(folder / name)
    return folder


def write_rows(path, rows):
    "Write rows as JSON lines; a string is written as it is."
    path.write_text("\n".join(o if isinstance(o, str) else json.dumps(o) for o in rows) + "\n")
    return str(path)


def good_rows(n=60):
    "Rows of a classification that can be learnt."
    return [
        dict(text=f"the film number {i} was {'fine' if i % 2 else 'dull'}", label="good" if i % 2 else "bad")
        for i in range(n)
    ]


def tiny_config(model, source, /, **sections):
    "A configuration for the tiny model, as nested dicts; sections given are merged into it."
    base = dict(
        model=dict(name=str(model), dtype="float32", device="cpu"),
        data=dict(source=str(source), test_size=20),
        method=dict(rank=4),
        train=dict(lr=1e-2, batch_size=4, save_every=2),
        evaluate=dict(samples=4, max_new_tokens=4),
        forgetting=dict(texts=["newspaper"], rows=8, prompts=2),
    )
    if "type" in sections.get("method", {}):
        base["method"] = {}  # a rank belongs to LoRA
    for name, given in sections.items():
        base[name] = base.get(name, {}) | given if isinstance(given, dict) else given
    return base


def write_config(path, config):
    "Write a configuration as YAML."
    path.write_text(yaml.safe_dump(config))
    return path
