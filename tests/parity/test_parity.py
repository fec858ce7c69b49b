"Every method held against the library that people use for it, in one table: `pytest tests/parity/test_parity.py -s`."

import os

import pytest

from rivals import variable
from studies.merge_parity import parity
import test_bottleneck, test_lora, test_prompts

TABLE = {
    "LoRA against peft": test_lora.parity_rows,
    "Bottlenecks against plain torch": test_bottleneck.plain_torch_rows,
    "(IA)3 against peft": test_bottleneck.ia3_rows,
    "BitFit against trained biases": test_bottleneck.bitfit_rows,
    "Soft prompts against peft": test_prompts.parity_rows,
}
COLUMNS = ["logits", "gradients", "weights"]


def test_the_parity_table(capsys):
    found, wide = {}, 110
    with capsys.disabled():
        print(
            
                "\nLargest absolute difference in float32, with the same weights and inputs; weights: after ten "
                f"steps of AdamW\n{'':{wide}} {' '.join(f'{c:>9}' for c in COLUMNS)}"
            
        )
        for title, rows in TABLE.items():
            print(title)
            found |= {(title, what): gaps for what, gaps in rows()}
            for (t, what), gaps in found.items():
                if t == title:
                    print(
                        f"  {what[: wide - 2]:{wide - 2}} "
                        + " ".join(f"{gaps[c]:9.1e}" if c in gaps else f"{'':9}" for c in COLUMNS)
                    )
    assert len(found) > 60 and {title for title, _ in found} == set(TABLE)
    for what, gaps in found.items():
        assert {"logits", "gradients"} <= set(gaps) and all(v < 1e-5 for v in gaps.values()), what


def test_the_table_can_fail(monkeypatch):
    from ftbook.methods.lora import LoRALinear

    monkeypatch.setattr(LoRALinear, "finish", lambda self, y: y * 1.001)
    with pytest.raises(AssertionError):
        assert all(
            v < 1e-5
            for v in test_lora.compare(
                test_lora.LoRA(rank=4, alpha=8).apply(test_lora.make("Llama")),
                test_lora.peft_twin(test_lora.make("Llama"), r=4, lora_alpha=8),
                steps=0,
            ).values()
        )


@pytest.mark.skipif(not os.environ.get(variable("mergekit")), reason="no environment with mergekit is named")
def test_the_merging_table(capsys):
    runs, wide = parity(), 60
    with capsys.disabled():
        print("\nMerged tensors against mergekit, largest absolute difference")
        for r in runs:
            print(f"  {r['question']:{wide}} {r['largest']:9.1e}  of 1e-06")
    assert len(runs) >= 30
    for r in runs:
        assert r["largest"] <= 1e-6, r["question"]
