"The protocol: targets, files, modes, and models left as they were."

import json, subprocess, sys
from dataclasses import dataclass

import pytest, torch
from torch import nn

from ftbook.methods import files as methods_files
from ftbook.methods import fold as methods_fold
from ftbook.methods import parts as methods_parts
from ftbook.methods import protocol as methods_protocol
from ftbook.methods import summary as methods_summary
from ftbook.methods import targets as methods_targets
from ftbook.methods.lora_method import LoRA
from cases.methods import saved, small, snapshot, untouched


# Targets


def test_targets():
    model = small()
    every = methods_targets.find_modules(model)
    assert len(every) == 14 and "lm_head" not in every and methods_targets.find_modules(model, "ALL-LINEAR") == every
    assert methods_targets.find_modules(model, ["lm_head"]) == ["lm_head"]
    assert methods_targets.find_modules(model, ("v_proj", "model.layers.0.mlp.up_proj")) == [
        n for n in every if n.endswith("v_proj") or n == "model.layers.0.mlp.up_proj"
    ]
    assert methods_targets.find_modules(model, r".*\.1\..*") == [n for n in every if ".1." in n]


def test_heads_of_classifiers_are_left_out():
    from transformers import BertConfig, BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=30)
    assert "classifier" not in methods_targets.find_modules(BertForSequenceClassification(BertConfig(**sizes)))
    assert not [
        n
        for n in methods_targets.find_modules(RobertaForSequenceClassification(RobertaConfig(**sizes)))
        if n.startswith("classifier")
    ]


# Apply, remove


def test_apply_and_remove_leave_no_trace():
    model = small()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = snapshot(model)
    ids = torch.randint(0, 50, (2, 5))
    logits = model(ids).logits
    LoRA(rank=2).apply(model)
    assert torch.equal(model(ids).logits, logits)
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    methods_fold.remove_(model)
    assert untouched(model, before) and not any(m._forward_hooks for m in model.modules())


def test_summary():
    model = small()
    total = sum(p.numel() for p in model.parameters())  # the tied head once
    assert methods_summary.trainable_summary(model).share == 1
    s = methods_summary.trainable_summary(LoRA(rank=2, target_modules=["q_proj", "v_proj"]).apply(model))
    assert (s.trained, s.total, s.n_bytes, s.by_module) == (
        2 * 2 * (64 + 48),
        total + 448,
        4 * 448,
        {"q_proj": 256, "v_proj": 192},
    )
    assert "448 of" in repr(s) and "<table" in s._repr_html_()
    assert "nothing" in repr(methods_summary.trainable_summary(nn.Linear(2, 2).requires_grad_(False)))


# Merging


def test_merge_and_back(saved):
    model, _ = saved
    ids = torch.randint(0, 50, (2, 5))
    state, logits = snapshot(model)[0], model(ids).logits
    merged = methods_fold.merge_(model)(ids).logits
    assert (merged - logits).abs().max() < 1e-5 and any(
        not torch.equal(v, state[k]) for k, v in model.state_dict().items()
    )
    with pytest.raises(ValueError, match="merged already"):
        methods_fold.merge_(model)
    methods_fold.unmerge_(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and torch.equal(
        model(ids).logits, logits
    )
    with pytest.raises(ValueError, match="not merged"):
        methods_fold.unmerge_(model)


def test_merged_model_is_plain_and_loads_without_ftbook(saved, tmp_path):
    from transformers import AutoModelForCausalLM

    model, _ = saved
    ids = torch.randint(0, 50, (2, 5))
    logits = model(ids).logits
    methods_fold.remove_(methods_fold.merge_(model, keep=False))
    assert not methods_parts.parts_of(model)
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (again(ids).logits - logits).abs().max() < 1e-5


# Files


def test_round_trip(saved, tmp_path):
    model, folder = saved
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    ids = torch.randint(0, 50, (2, 5))
    again = methods_files.load_adapter(small(), folder)
    assert torch.equal(again(ids).logits, model(ids).logits) and again.ftbook_method.rank == 2
    assert methods_summary.trainable_summary(again).trained == methods_summary.trainable_summary(model).trained
    methods_fold.merge_(model)  # merged or not, the file is the same
    methods_files.save_adapter(model, tmp_path / "b")
    assert all((tmp_path / "b" / p.name).read_bytes() == p.read_bytes() for p in folder.iterdir())


def test_a_list_may_name_more_than_is_there(saved):
    folder = saved[1]
    config = json.loads((folder / methods_files.CONFIG).read_text())
    (folder / methods_files.CONFIG).write_text(
        json.dumps({**config, "target_modules": config["target_modules"] + ["c_attn"]})
    )
    ids = torch.randint(0, 50, (2, 5))
    assert torch.equal(methods_files.load_adapter(small(), folder)(ids).logits, saved[0](ids).logits)


in_a_fresh_python = """
import sys
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM
from ftbook.methods.files import load_adapter
from ftbook.methods.protocol import HOMES, METHODS

assert not METHODS, METHODS
for kind, home in HOMES.items():
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(Path(sys.argv[1]) / "base"))
    method = load_adapter(model, Path(sys.argv[1]) / kind).ftbook_method
    assert METHODS[kind].__module__ == home, (kind, METHODS[kind])
    left = "PROMPT_TUNING" if kind == "P_TUNING" else kind  # a file of P-tuning holds the prompt that it made
    assert method.peft_type == left, (kind, method)
"""


def test_load_adapter_finds_every_method_in_a_fresh_python(tmp_path):
    for kind in methods_protocol.HOMES:
        cls = methods_protocol.find_method(kind)
        given = {"encoder_hidden_size": 8} if kind == "P_TUNING" else {}
        methods_files.save_adapter(cls(**given).apply(small(width=64)), tmp_path / kind)
    small(width=64).config.save_pretrained(tmp_path / "base")
    done = subprocess.run([sys.executable, "-c", in_a_fresh_python, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# The mode of the model: what a method puts in is in training mode only where the model is


def modes(model):
    return {m.training for m in model.modules()}


def busy(model):
    "Give every trained tensor random numbers, so that no part does nothing."
    torch.manual_seed(5)
    for n in model.ftbook_added:
        nn.init.normal_(model.get_parameter(n), std=0.3)
    return model


def speaks(model):
    "Two calls on the same tokens."
    ids = torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return [model(ids).logits for _ in range(2)]


def methods_of_every_kind():
    from ftbook.methods.bottleneck import KINDS
    from ftbook.methods.bitfit import BitFit
    from ftbook.methods.bottleneck_method import Bottleneck
    from ftbook.methods.ia3 import IA3
    from ftbook.methods.prefix_tuning import PrefixTuning
    from ftbook.methods.prompt_tuning import PromptTuning
    from ftbook.methods.p_tuning import PTuning

    head = dict(modules_to_save=["lm_head"])
    found = {f"bottleneck-{k}": Bottleneck(k, 4, dropout=0.5, **head) for k in KINDS}
    return found | {
        "lora": LoRA(rank=2, dropout=0.5),
        "lora-head": LoRA(rank=2, dropout=0.5, **head),
        "dora": LoRA(rank=2, dropout=0.5, use_dora=True),
        "lora-bias": LoRA(rank=2, dropout=0.5, lora_bias=True),
        "lora-embedding": LoRA(rank=2, dropout=0.5, target_modules=["embed_tokens", "v_proj"]),
        "pissa": LoRA(rank=2, dropout=0.5, init="pissa"),
        "ia3": IA3(**head),
        "bitfit": BitFit(**head),
        "prompt": PromptTuning(2, **head),
        "p-tuning": PTuning(2),
        "prefix": PrefixTuning(2),
        "prefix-text": PrefixTuning(2, init="text", text=[3, 4]),
        "prefix-network": PrefixTuning(2, projection=True),
    }


kinds_of_method = methods_of_every_kind()
every_method = pytest.mark.parametrize("method", kinds_of_method.values(), ids=kinds_of_method)
either_mode = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def in_mode(model, method, training):
    "Whether the model is in one mode, and drops what it drops in that mode alone."
    one, two = speaks(model)
    drops = training and getattr(method, "dropout", 0) > 0
    return model.training is training and modes(model) == {training} and torch.equal(one, two) is not drops


@either_mode
@every_method
def test_a_method_takes_over_the_mode(method, training):
    model = busy(method.apply(small().train(training)))
    assert in_mode(model, method, training) and in_mode(model.train(not training), method, not training)
    assert modes(methods_fold.remove_(model)) == {not training}


@either_mode
@every_method
def test_a_loaded_adapter_takes_over_the_mode(method, training, tmp_path):
    written = busy(method.apply(small().train(not training)))
    model = methods_files.load_adapter(small().train(training), methods_files.save_adapter(written, tmp_path))
    assert in_mode(model, model.ftbook_method, training)
    one, want = speaks(model.eval())[0], speaks(written.eval())[0]
    assert torch.allclose(one, want, atol=1e-5)


def peft_adapter(model, folder, **config):
    "An adapter that peft wrote, and what peft makes of it in evaluation mode."
    import peft

    torch.manual_seed(2)
    theirs = peft.get_peft_model(
        model, peft.LoraConfig(**{"r": 4, "lora_dropout": 0.5, "target_modules": "all-linear", **config})
    )
    for n, p in theirs.named_parameters():
        if "lora" in n or "modules_to_save" in n:
            p.data.add_(0.2 * torch.randn_like(p))
    theirs.save_pretrained(folder)
    return speaks(theirs.eval())[0]


@pytest.mark.parametrize(
    "config",
    [{}, dict(use_dora=True), dict(modules_to_save=["norm"]), dict(target_modules=["embed_tokens", "up_proj"])],
    ids=["LoRA", "DoRA", "whole", "embedding"],
)
def test_an_adapter_of_peft_with_dropout_gives_its_logits(config, tmp_path):
    want = peft_adapter(small().eval(), tmp_path, **config)
    model = methods_files.load_adapter(small().eval(), tmp_path)
    assert model.ftbook_method.dropout == 0.5 and modes(model) == {False}
    one, two = speaks(model)
    assert torch.equal(one, two) and torch.allclose(one, want, atol=1e-5)
    assert modes(methods_files.load_adapter(small().train(), tmp_path)) == {True}


def test_switching_adapters_takes_over_the_mode():
    from ftbook.methods.switching import add_adapter_, use_adapter_

    model = LoRA(rank=2, dropout=0.5).apply(small().train())
    model.eval()
    add_adapter_(model, "second", LoRA(rank=2, dropout=0.5, seed=1))
    assert modes(busy(model)) == {False} and torch.equal(*speaks(model))
    model.train()
    assert modes(use_adapter_(model, "default")) == {True}


@pytest.mark.parametrize("kind", ["lora", "bottleneck-houlsby"])
def test_one_frozen_layer_stays_as_it_is(kind):
    "A part keeps to the layer around it, and changes no mode of the model's own modules."
    model = small().train()
    model.model.layers[0].eval()
    before = {m: m.training for m in model.modules()}
    kinds_of_method[kind].apply(model)
    for name, m in model.named_modules():
        assert m.training is (".layers.0" not in f".{name}"), name
    assert all(m.training is was for m, was in before.items())
    methods_fold.remove_(model)
    assert {m: m.training for m in model.modules()} == before


def test_a_layer_put_in_after_eval_wakes_no_dropout():
    "The model says that it is not in training, and one layer of it says that it is."
    model = small().eval()
    model.lm_head = nn.Linear(32, 50)
    assert model.lm_head.training
    busy(LoRA(rank=2, dropout=0.5, target_modules=["lm_head"]).apply(model))
    assert not model.lm_head.training and torch.equal(*speaks(model))


def test_a_whole_module_keeps_the_modes_inside_it():
    model = nn.ModuleDict(dict(body=nn.Linear(2, 2), head=nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))))
    model["head"][1].eval()
    LoRA(rank=1, target_modules=["body"], modules_to_save=["head"]).apply(model)
    assert [m.training for m in model["head"].whole] == [True, False] and model["head"].training


class Noisy(methods_parts.Part):
    "Holds modules of its own."

    def __init__(self, base):
        super().__init__(base)
        self.gain, self.deep = nn.Parameter(torch.ones(1)), nn.Sequential(nn.Sequential(nn.Dropout(0.5)))

    def forward(self, x):
        return self.deep(self.base(x) * self.gain)


@dataclass
class ByItself(methods_protocol.Method):
    "A method of somebody else, who puts parts in without `replace_`."

    def shapes(self, model):
        return {"model.layers.1.mlp.down_proj.gain": (1,)}

    def inject_(self, model):
        model.model.layers[1].mlp.down_proj = Noisy(model.model.layers[1].mlp.down_proj)


@either_mode
def test_a_method_that_puts_parts_in_by_itself(training):
    model = ByItself().apply(small().train(training))
    assert modes(model) == {training} and torch.equal(*speaks(model)) is not training


@pytest.mark.parametrize("backend", ["ftbook", "bitsandbytes"])
@either_mode
def test_quantised_layers_take_over_the_mode(training, backend):
    from ftbook.methods.quant import quantize_
    from ftbook.methods.quant_model import dequantize_

    model = quantize_(small(width=64).train(training), backend=backend)
    assert modes(model) == {training}
    busy(LoRA(rank=2, dropout=0.5).apply(model))
    assert modes(model) == {training} and torch.equal(*speaks(model)) is not training
    assert modes(dequantize_(methods_fold.remove_(model))) == {training}
