"Adapters: targets that match nothing, folders that cannot be written, files that are broken or of another model."

import json, os, stat
from dataclasses import dataclass

import pytest, torch
from safetensors.torch import load_file, save_file
from torch import nn

from ftbook.methods import files as methods_files
from ftbook.methods import fold as methods_fold
from ftbook.methods import parts as methods_parts
from ftbook.methods import protocol as methods_protocol
from ftbook.methods import targets as methods_targets
from ftbook.methods.lora_method import LoRA
from cases.methods import saved, small, snapshot, untouched


# Targets


@pytest.mark.parametrize(
    "targets, said",
    [
        (["qproj"], "q_proj (2)"),
        ("q_proj", "matches nothing"),
        (["q_proj", "embed_tokens"], "Embedding"),
        (r".*norm", "LlamaRMSNorm"),
    ],
)
def test_targets_that_match_nothing(targets, said):
    with pytest.raises(ValueError, match="target_modules") as e:
        methods_targets.find_modules(small(), targets)
    assert said in str(e.value) and "all-linear" in str(e.value)


def test_nothing_to_match():
    with pytest.raises(ValueError, match="no linear layer at all"):
        methods_targets.find_modules(nn.Embedding(2, 2))


# Apply, remove


def test_a_refused_method_changes_nothing():
    model = small()
    before = snapshot(model)
    for method in (LoRA(rank=20), LoRA(target_modules=["nope"])):
        with pytest.raises(ValueError):
            method.apply(model)
        assert untouched(model, before)


def test_twice():
    model = LoRA(rank=2).apply(small())
    with pytest.raises(ValueError, match="already has a method.*remove_"):
        LoRA(rank=2).apply(model)
    methods_fold.remove_(model)
    assert LoRA(rank=3).apply(model).ftbook_method.rank == 3


@pytest.mark.parametrize(
    "act",
    [
        lambda m, f: methods_files.save_adapter(m, f),
        lambda m, f: methods_fold.merge_(m),
        lambda m, f: methods_fold.unmerge_(m),
        lambda m, f: methods_fold.remove_(m),
    ],
)
def test_no_method(act, tmp_path):
    with pytest.raises(ValueError, match="no method on it"):
        act(small(), tmp_path / "x")
    assert not (tmp_path / "x").exists()


# Merging


def test_without_originals_there_is_no_way_back(saved):
    model, _ = saved
    methods_fold.merge_(model, keep=False)
    with pytest.raises(ValueError, match="were not kept"):
        methods_fold.unmerge_(model)


def test_a_tied_weight_is_not_merged():
    model = LoRA(rank=2, target_modules=["q_proj", "lm_head"]).apply(small())
    before = snapshot(model)[0]
    with pytest.raises(ValueError, match=r"lm_head\.weight is tied"):
        methods_fold.merge_(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_method_that_changes_no_weights_cannot_be_merged():
    @dataclass
    class Nothing(methods_protocol.Method):
        def shapes(self, model):
            return {}

        def inject_(self, model):
            pass

    with pytest.raises(ValueError, match="cannot be merged"):
        methods_fold.merge_(Nothing().apply(small()))


# Files


def test_saving_replaces_and_a_failure_does_not(saved, monkeypatch):
    model, folder = saved
    old = {p.name: p.read_bytes() for p in folder.iterdir()}
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1)

    def full(tensors, path, metadata=None):
        path.write_bytes(b"half a fi")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(methods_files, "save_file", full)
    with pytest.raises(OSError, match="cannot save the adapter in .*No space left"):
        methods_files.save_adapter(model, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == old
    monkeypatch.undo()
    methods_files.save_adapter(model, folder)
    assert {p.name for p in folder.iterdir()} == set(old) and (folder / methods_files.WEIGHTS).read_bytes() != old[
        methods_files.WEIGHTS
    ]


def test_a_folder_that_is_a_file(saved, tmp_path):
    (tmp_path / "file").write_text("here")
    with pytest.raises(OSError, match="cannot save the adapter"):
        methods_files.save_adapter(saved[0], tmp_path / "file")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(saved, tmp_path):
    (tmp_path / "ro").mkdir()
    (tmp_path / "ro").chmod(stat.S_IREAD | stat.S_IEXEC)
    with pytest.raises(OSError, match="cannot save the adapter"):
        methods_files.save_adapter(saved[0], tmp_path / "ro" / "a")


def refused(folder, said, model=None, error=ValueError):
    model = model or small()
    before = snapshot(model)
    with pytest.raises(error) as e:
        methods_files.load_adapter(model, folder)
    assert all(o in str(e.value) for o in ([said] if isinstance(said, str) else said)), str(e.value)
    assert untouched(model, before)


def test_missing_and_broken_files(saved, tmp_path):
    folder = saved[1]
    refused(tmp_path, "no adapter_config.json", error=FileNotFoundError)
    whole = (folder / methods_files.WEIGHTS).read_bytes()
    for n in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        (folder / methods_files.WEIGHTS).write_bytes(whole[:n])
        refused(folder, ["adapter_model.safetensors is damaged", f"{n:,} bytes"])
    (folder / methods_files.WEIGHTS).write_bytes(b"\xff" * len(whole))
    refused(folder, "is damaged")
    (folder / methods_files.WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"x")
    refused(folder, ["no adapter_model.safetensors", "pickle"], error=FileNotFoundError)
    (folder / methods_files.CONFIG).write_text('{"peft_type": "LORA",')
    refused(folder, ["adapter_config.json is not valid JSON", "line 1"])
    (folder / methods_files.CONFIG).write_text("[]")
    refused(folder, "no peft_type")
    (folder / methods_files.CONFIG).write_text('{"peft_type": "VERA"}')
    refused(folder, ["'VERA' is not known", "LORA"])


def test_nan_is_named(saved):
    model, folder = saved
    tensors = load_file(folder / methods_files.WEIGHTS)
    name = list(tensors)[3]
    tensors[name][0, 0] = float("nan")
    save_file(tensors, folder / methods_files.WEIGHTS)
    refused(folder, [name, "1 values that are NaN"])
    with torch.no_grad():
        methods_files.adapter_tensors(model)[name][0] = float("inf")
    with pytest.raises(ValueError, match="not saved.*NaN or infinite"):
        methods_files.save_adapter(model, folder)


def test_another_architecture(saved):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = saved[1]
    refused(
        folder,
        ["does not fit", "q_proj.lora_A.weight is (2, 32) in the file and (2, 48) in the model"],
        small(width=48),
    )
    refused(folder, ["has no place for base_model.model.model.layers.1", "and 11 more"], small(layers=1))
    refused(folder, "q_proj", GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=30)))
    config = json.loads((folder / methods_files.CONFIG).read_text())
    (folder / methods_files.CONFIG).write_text(
        json.dumps(
            {**config, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]}
        )
    )
    refused(folder, ["the file lacks base_model.model.model.layers.2", "and 11 more"], small(layers=3))
    tensors = load_file(folder / methods_files.WEIGHTS)
    save_file({k: v for k, v in tensors.items() if "up_proj" not in k}, folder / methods_files.WEIGHTS)
    refused(folder, "the file lacks base_model.model.model.layers.0.mlp.up_proj.lora_A.weight")


def test_loading_onto_a_method(saved):
    with pytest.raises(ValueError, match="already has a method"):
        methods_files.load_adapter(saved[0], saved[1])


# Merging is all or nothing


def methods_that_stay():
    from ftbook.methods.bottleneck_method import Bottleneck
    from ftbook.methods.prefix_tuning import PrefixTuning
    from ftbook.methods.prompt_tuning import PromptTuning

    return [
        Bottleneck(bottleneck_size=4, modules_to_save=["lm_head"]),
        PromptTuning(num_virtual_tokens=2, modules_to_save=["lm_head"]),
        PrefixTuning(num_virtual_tokens=2, modules_to_save=["lm_head"]),
    ]


@pytest.mark.parametrize("method", methods_that_stay(), ids=lambda m: type(m).__name__)
def test_a_method_that_cannot_be_merged_leaves_its_whole_modules_alone(method):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = method.apply(
        LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=50,
            )
        )
    )
    assert any(isinstance(p, methods_parts.Whole) for p in methods_parts.parts_of(model).values())
    with pytest.raises(ValueError, match="cannot be merged"):
        methods_fold.merge_(model)
    assert not any(p.merged or p.kept for p in methods_parts.parts_of(model).values())
