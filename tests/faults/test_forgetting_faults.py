"Remedies, tables, batteries and adapters that do not fit."

import copy, json

import pytest, torch
from transformers import LlamaConfig, LlamaForCausalLM

from tiny import seeded
from ftbook.forgetting import battery as forgetting_battery
from ftbook.forgetting import choices as forgetting_choices
from ftbook.forgetting import lost as forgetting_lost
from ftbook.forgetting import remedies as forgetting_remedies
from ftbook.forgetting import report as forgetting_report
from ftbook.forgetting import sequences as forgetting_sequences
from ftbook.data.split import normalise
from ftbook.methods.lora_method import LoRA
from ftbook.methods.files import save_adapter
from ftbook.models.load import load_tokenizer
from ftbook.training.tune import finetune
from cases.forgetting import loaded, rows_of_ids, small_battery, small_llama, tiny


# Fisher, spring, teacher


def test_a_run_does_not_go_on_with_another_regulariser(tmp_path):
    rows, base = rows_of_ids(), seeded(small_llama)

    def run(regularizer, **more):
        return finetune(
            copy.deepcopy(base), rows, batch_size=3, out=tmp_path, regularizer=regularizer, progress=False, **more
        )

    def stop(state):
        state.stop = state.step == 1

    run(forgetting_remedies.Spring(base, 1.0), callbacks=[stop])
    with pytest.raises(ValueError, match="regularizer was 'Spring"):
        run(None, resume=True)
    with pytest.raises(ValueError, match="regularizer was 'Spring"):
        run(forgetting_remedies.Spring(base, 2.0), resume=True)
    assert run(forgetting_remedies.Spring(base, 1.0), resume=True).stopped == "finished"


def test_remedies_refuse_what_they_cannot_do():
    model, rows = seeded(small_llama), rows_of_ids()
    with pytest.raises(ValueError, match="strength must be at least 0, not -1"):
        forgetting_remedies.Spring(model, -1)
    with pytest.raises(ValueError, match="no row to take the Fisher information over"):
        forgetting_remedies.fisher(model, [])
    with pytest.raises(ValueError, match="no text to distil on"):
        forgetting_remedies.Distill(model, [], 1.0)
    with pytest.raises(ValueError, match="at least 0 and below 1, not 1"):
        forgetting_remedies.replay(rows, rows, 1)
    with pytest.raises(ValueError, match="no old row to replay"):
        forgetting_remedies.replay(rows, [], 0.5)
    with pytest.raises(ValueError, match="taken before the training"):
        forgetting_remedies.Interpolation(model)
    with pytest.raises(ValueError, match="no point at x = 0"):
        forgetting_remedies.pick_interpolation([dict(x=0.5, task=1.0, other=1.0)])
    with pytest.raises(ValueError, match="not finite"):
        forgetting_remedies.pick_interpolation([dict(x=0, task=1.0, other=float("nan"))])


# Sequences


def test_transfer_refuses_a_table_with_holes():
    with pytest.raises(ValueError, match="task 2 after task 1 is missing"):
        forgetting_sequences.transfer([[0, 0], [1, float("nan")], [1, 1]])
    with pytest.raises(ValueError, match="T \\+ 1"):
        forgetting_sequences.transfer([[1], [2]])


# The battery


def test_bad_input_is_named(loaded, tiny, tmp_path):
    model, tokenizer = loaded
    with pytest.raises(ValueError, match="battery is empty"):
        forgetting_battery.make_battery(tokenizer, [], [], 0)
    bigger, battery = copy.deepcopy(model), small_battery(tokenizer)
    bigger.resize_token_embeddings(49160)
    with pytest.raises(ValueError, match="49,152 tokens and after 49,160"):
        forgetting_report.forgetting_report(model, bigger, battery)
    smaller = seeded(small_llama)
    with pytest.raises(ValueError, match="battery's tokenizer"):
        forgetting_battery.measure_battery(smaller, battery)
    other = load_tokenizer(str(tiny))
    other.add_tokens(["<new>"])
    bigger.save_pretrained(tmp_path / "bigger")
    other.save_pretrained(tmp_path / "bigger")
    with pytest.raises(ValueError, match="before has 49,152"):
        forgetting_report.forgetting_report(model, tmp_path / "bigger", battery)
    shuffled = json.loads((tmp_path / "bigger/tokenizer.json").read_text())
    vocab = shuffled["model"]["vocab"]
    a, b = list(vocab)[500:502]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (tmp_path / "bigger/tokenizer.json").write_text(json.dumps(shuffled))
    with pytest.raises(ValueError, match="with one tokenizer"):
        forgetting_report.forgetting_report(model, tmp_path / "bigger", battery)


def test_what_cannot_be_asked_is_named(loaded):
    tokenizer = loaded[1]
    with pytest.raises(ValueError, match="a choice takes 2 to 50"):
        forgetting_choices.make_task("one", forgetting_choices.shipped_battery()["facts"][:1], tokenizer)
    everything = [normalise(t) for t in forgetting_lost.forgetting_texts("newspaper", 9999)]
    with pytest.raises(ValueError, match="newspaper has 0 texts"):
        forgetting_lost.forgetting_texts("newspaper", 5, everything)


def test_an_adapter_for_another_base_is_refused_and_leaves_the_base(loaded, tmp_path):
    model, tokenizer = loaded
    wide = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    save_adapter(LoRA(rank=2).apply(wide), tmp_path)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError):
        forgetting_report.forgetting_report(model, tmp_path, small_battery(tokenizer))
    assert getattr(model, "ftbook_method", None) is None and all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values())
    )
