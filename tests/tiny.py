"Models, files and configurations so small that a whole run takes about a second."

import json

import torch, yaml

from ftbook.models.shipped import model_folder


def seeded(build, seed=0):
    "A random model that `build` makes, always the same, in training."
    torch.manual_seed(seed)
    return build().train()


VOCAB = 60


def decoder(width, **more):
    "Settings of a Llama and of its relatives: two layers, grouped queries."
    sizes = dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2)
    return sizes | dict(num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCAB) | more


def small_llama(width=32, **more):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**decoder(width, **more)))


def small_qwen(width=32, **more):
    from transformers import Qwen2Config, Qwen2ForCausalLM  # biases on q, k and v, none elsewhere

    return Qwen2ForCausalLM(Qwen2Config(**decoder(width, **more)))


def small_gpt2(width=32, **more):
    from transformers import GPT2Config, GPT2LMHeadModel  # Conv1D, a tied head, learnt positions

    sizes = dict(n_embd=width, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=64)
    still = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes | still | dict(bos_token_id=0, eos_token_id=1) | more))


def small_bert(width=32, head="MaskedLM", **more):
    import transformers

    sizes = dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4)
    still = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = transformers.BertConfig(**sizes | still | dict(vocab_size=VOCAB) | more)
    return getattr(transformers, f"BertFor{head}")(config)


def small_t5(width=32, **more):
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = dict(d_model=width, d_kv=width // 4, d_ff=2 * width, num_layers=2, num_heads=4, vocab_size=VOCAB)
    how = dict(dropout_rate=0.0, feed_forward_proj="gated-gelu", decoder_start_token_id=0)
    return T5ForConditionalGeneration(T5Config(**sizes | how | more))


SMALL = {"Llama": small_llama, "Qwen2": small_qwen, "GPT-2": small_gpt2, "BERT": small_bert, "T5": small_t5}


def gap(pairs):
    "The largest difference within pairs of tensors."
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


def grads_of(model):
    "Copies of the gradients, by the names of their parameters."
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def snapshot(model):
    "The weights, the kinds of modules, and what is trained."
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    return weights, [type(m) for m in model.modules()], [p.requires_grad for p in model.parameters()]


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
        forgetting=dict(texts=["newspaper"], rows=8, prompts=2, tasks=[]),  # the facts take half of a run
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
