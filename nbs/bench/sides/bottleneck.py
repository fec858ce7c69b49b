"""What ftbook and the `adapters` package both do with the same small models: load, train ten steps, save.

python sides/bottleneck.py FOLDER    the package answers every question in FOLDER; needs no ftbook
"""

import json, sys
from importlib.metadata import version
from pathlib import Path

# STD: of the adapter's weights and biases, so that nothing that is compared is zero
VOCAB, STEPS, LR, STD = 60, 10, 1e-3, 0.1
small = dict(vocab_size=VOCAB)
ARCHITECTURES = {  # name -> (class of the model, class of its configuration, what it is built with)
    'BERT': (
        'BertForMaskedLM',
        'BertConfig',
        dict(
            small,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
    ),
    'DistilBERT': (
        'DistilBertForMaskedLM',
        'DistilBertConfig',
        dict(small, dim=32, n_layers=2, n_heads=4, hidden_dim=64, dropout=0.0, attention_dropout=0.0),
    ),
    'GPT-2': (
        'GPT2LMHeadModel',
        'GPT2Config',
        dict(
            small,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=1,
        ),
    ),
    'Llama': (
        'LlamaForCausalLM',
        'LlamaConfig',
        dict(
            small,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
    ),
    'Qwen2': (
        'Qwen2ForCausalLM',
        'Qwen2Config',
        dict(
            small,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
    ),
    'T5': (
        'T5ForConditionalGeneration',
        'T5Config',
        dict(
            small,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj='gated-gelu',
            # version 4 of transformers has no other attention for T5
            decoder_start_token_id=0,
            tie_word_embeddings=False,
            initializer_factor=0.3,
            attn_implementation='eager',
        ),
    ),
}
# the package's names for its default configurations
DEFAULTS = dict(houlsby='double_seq_bn', pfeiffer='seq_bn', parallel='par_bn')
TIED_HEAD = 'BERT', 'DistilBERT'  # their heads share a tensor, which the package cannot save to safetensors
# one activation each
KINDS = dict(
    houlsby=dict(activation='swish'), pfeiffer=dict(activation='relu'), parallel=dict(activation='gelu', scaling=4.0)
)
SIZE = 7  # does not divide 32, so the reduction factor has to be a fraction


# What both sides do


def build(name):
    "The model, with random weights."
    import torch, transformers

    model, config, given = ARCHITECTURES[name]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**given)).train()


def batch(step):
    "Random ids, other ones for each step."
    import torch

    ids = torch.randint(2, VOCAB, (2, 12), generator=torch.Generator().manual_seed(step))
    return dict(input_ids=ids, labels=ids)


def train(model, parameters):
    "Logits, gradients and, after ten steps, weights and logits again; `parameters` by the package's names."
    import torch

    optimizer, found = torch.optim.AdamW(parameters.values(), lr=LR), {}
    for step in range(STEPS):
        out = model(**batch(step))
        optimizer.zero_grad()
        out.loss.backward()
        if step == 0:
            found = {'logits': out.logits.detach().clone()} | {
                f'gradient {k}': p.grad.clone() for k, p in parameters.items()
            }
        optimizer.step()
    with torch.no_grad():
        after = model(**batch(0)).logits
    return found | {f'weight {k}': p.detach().clone() for k, p in parameters.items()} | {'after': after}


# The package


def answer(folder):
    "Answer every question in a folder; runs where the package is installed."
    for name in ARCHITECTURES:
        for kind in KINDS:
            answer_one(folder, name, kind)
    (folder / 'versions.json').write_text(json.dumps({p: version(p) for p in ('adapters', 'transformers', 'torch')}))


def answer_one(folder, name, kind):
    "Read the base and the adapter, train, and save what came of it."
    import adapters, torch
    from safetensors.torch import load_file, save_file

    here = folder / f'{name} {kind}'
    model = build(name)
    state = load_file(folder / f'{name}.safetensors')
    lost = set(state) ^ set(model.state_dict())
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        base = model(**batch(0)).logits
    adapters.init(model)
    adapter = model.load_adapter(str(here / 'ours'), use_safetensors=True, set_active=True)
    model.train_adapter(adapter)
    model.train()
    parameters = {k: p for k, p in model.named_parameters() if f'adapters.{adapter}.' in k}
    found = train(model, parameters)
    model.save_adapter(str(here / 'theirs'), adapter, use_safetensors=True, with_head=False)
    save_file({k: t.contiguous() for k, t in (found | {'base': base}).items()}, here / 'answer.safetensors')
    native(model, here / 'native', kind, with_head=name not in TIED_HEAD)
    if lost:
        (here / 'lost.json').write_text(json.dumps(sorted(lost)))


def native(model, folder, kind, with_head):
    "Save an adapter that the package has made by itself, and the logits that it gives."
    import torch
    from safetensors.torch import save_file

    model.add_adapter('native', config=DEFAULTS[kind])
    torch.manual_seed(2)
    for k, p in model.named_parameters():
        if 'adapters.native.' in k:
            torch.nn.init.normal_(p, std=STD)
    model.set_active_adapters('native')
    with torch.no_grad():
        save_file({'logits': model(**batch(0)).logits}, folder.with_suffix('.safetensors'))
    model.save_adapter(str(folder), 'native', use_safetensors=True, with_head=with_head)


if __name__ == '__main__':
    answer(Path(sys.argv[1]))
