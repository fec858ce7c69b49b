"""The runs of `adapters.ipynb`: bottleneck adapters against the `adapters` package, which lives in an environment of its own.

    python adapters_worker.py                  every question put to both, compared, and written to results/adapters.json
    python adapters_worker.py answer FOLDER    the package answers the questions in FOLDER

FTBOOK_ADAPTERS_PYTHON names the interpreter of that environment. Both sides get the same weights, the same adapter (written by
`save_for_adapters`, read by the package) and the same ten batches, and give logits, gradients, the weights after ten steps of
AdamW and the logits after that. The package saves what it has trained, and one more adapter with its own default configuration;
`load_from_adapters` reads both.
"""

import json, os, subprocess, sys, tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
RESULTS = HERE / 'results' / 'adapters.json'
PYTHON = 'FTBOOK_ADAPTERS_PYTHON'
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
    import transformers

    model, config, given = ARCHITECTURES[name]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**given)).train()


def batch(step):
    ids = torch.randint(2, VOCAB, (2, 12), generator=torch.Generator().manual_seed(step))
    return dict(input_ids=ids, labels=ids)


def train(model, parameters):
    "Logits, gradients and, after ten steps, weights and logits again; `parameters` by the package's names."
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
    import adapters, transformers

    for name in ARCHITECTURES:
        for kind in KINDS:
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
    (folder / 'versions.json').write_text(json.dumps({p: version(p) for p in ('adapters', 'transformers', 'torch')}))


def native(model, folder, kind, with_head):
    "Save an adapter that the package has made by itself, and the logits that it gives."
    model.add_adapter('native', config=DEFAULTS[kind])
    torch.manual_seed(2)
    for k, p in model.named_parameters():
        if 'adapters.native.' in k:
            torch.nn.init.normal_(p, std=STD)
    model.set_active_adapters('native')
    with torch.no_grad():
        save_file({'logits': model(**batch(0)).logits}, folder.with_suffix('.safetensors'))
    model.save_adapter(str(folder), 'native', use_safetensors=True, with_head=with_head)


# Ours


def question(folder, name, kind):
    "Write the base, and a random adapter for it; return the model with the adapter on."
    from ftbook.methods.bottleneck_method import Bottleneck
    from ftbook.methods.package_adapters import save_for_adapters

    model = build(name)
    save_file({k: t.clone().contiguous() for k, t in model.state_dict().items()}, folder / f'{name}.safetensors')
    Bottleneck(kind, SIZE, **KINDS[kind]).apply(model)
    torch.manual_seed(1)
    for n in model.ftbook_added:
        torch.nn.init.normal_(model.get_parameter(n), std=STD)
    save_for_adapters(model, folder / f'{name} {kind}' / 'ours')
    return model


def compare(folder, name, kind, model):
    "The largest differences between the two answers."
    from ftbook.methods.bottleneck_method import bottlenecks
    from ftbook.methods.package_adapters import load_from_adapters, package_names

    here, lost = folder / f'{name} {kind}', folder / f'{name} {kind}' / 'lost.json'
    theirs = load_file(here / 'answer.safetensors')
    with torch.no_grad():
        base = build(name)(**batch(0)).logits
    names = package_names({n: o.place for n, o in bottlenecks(model).items()}, 'adapter')
    ours = train(model, {k: model.get_parameter(n) for n, k in names.items()}) | {'base': base}
    if ours.keys() != theirs.keys():
        raise ValueError(f'{name} {kind}: the package trains {sorted(theirs.keys() ^ ours.keys())[:3]}, or we do')
    with torch.no_grad():
        back = load_from_adapters(build(name), here / 'theirs')(**batch(0)).logits
        native = (
            load_from_adapters(build(name), here / 'native')(**batch(0)).logits
            - load_file(here / 'native.safetensors')['logits']
        )
    gap = lambda start: max(float((ours[k] - theirs[k]).abs().max()) for k in ours if k.startswith(start))
    return dict(
        architecture=name,
        kind=kind,
        bottleneck_size=SIZE,
        **KINDS[kind],
        tensors=len(names),
        base=gap('base'),
        logits=gap('logits'),
        gradients=gap('gradient'),
        weights=gap('weight'),
        after=gap('after'),
        theirs_read=float((back - theirs['after']).abs().max()),
        native_read=float(native.abs().max()),
        head=(here / 'native' / 'model_head.safetensors').exists(),
        effect=float((ours['logits'] - base).abs().max()),
        smallest_gradient=min(float(t.abs().max()) for k, t in theirs.items() if k.startswith('gradient')),
        lost=json.loads(lost.read_text()) if lost.exists() else [],
    )


def ask(python):
    "Put every question to both sides."
    import ftbook

    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        models = {(name, kind): question(folder, name, kind) for name in ARCHITECTURES for kind in KINDS}
        done = subprocess.run(
            [python, Path(__file__).resolve(), 'answer', folder],
            capture_output=True,
            text=True,
            env=os.environ | {'HF_HUB_OFFLINE': '1'},
        )
        if done.returncode:
            raise RuntimeError(f'{python} could not answer: {done.stderr[-2000:]}')
        runs = [compare(folder, *key, model) for key, model in models.items()]
        versions = dict(
            ours={p: version(p) for p in ('torch', 'transformers')} | {'ftbook': ftbook.__version__},
            package=json.loads((folder / 'versions.json').read_text()),
        )
    return runs, versions


def read():
    return json.loads(RESULTS.read_text(encoding='utf-8'))


def measure(python=None):
    "Ask, and write the results file."
    from domains_worker import where

    runs, versions = ask(python or os.environ[PYTHON])
    here = {k: v for k, v in where().items() if k != 'versions'}
    lines = ',\n'.join(json.dumps(run) for run in runs)
    RESULTS.write_text(
        (
            f'{{"machine": {json.dumps(here)},\n"versions": {json.dumps(versions)},\n"setting": '
            f'{json.dumps(dict(steps=STEPS, lr=LR, std=STD))},\n"runs": [\n{lines}\n]}}\n'
        ),
        encoding='utf-8',
    )


if __name__ == '__main__':
    answer(Path(sys.argv[2])) if sys.argv[1:2] == ['answer'] else measure()
