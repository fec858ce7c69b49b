"""Write the table of answers on the front page from the committed results. `--check` writes nothing and exits 1 when it is stale.

The table lies in nbs/index.ipynb between two comments. Every number comes from nbs/bench/results; what a row compares is
said in the row, and the page that measured it is linked.
"""

import json, re, sys
from pathlib import Path
from statistics import mean as mean_of, median, stdev

from scipy.stats import t

from ftbook.results import read_results

root = Path(__file__).resolve().parent.parent
results = root / "nbs/bench/results"
index = root / "nbs/index.ipynb"
START, END = "<!-- answers -->", "<!-- end of answers -->"
HEAD = ["what was measured", "ftbook", "beside it", "ratio", "device, runs"]


def read(
    name: str,  # A file in nbs/bench/results, without .jsonl
) -> list[dict]:  # Its runs, each with the processor it ran on
    "Read the runs of one measurement."
    found = read_results(results / f"{name}.jsonl")
    return [r | dict(cpu=found["machines"][r["machine"]]["cpu"]) for r in found["runs"]]


def times(
    ratio: float,  # Of two measurements
) -> str:  # With two digits that count
    "Say a ratio."
    return f"{ratio:.1f}×" if ratio < 20 else f"{ratio:.0f}×"


def training_row() -> list[str]:
    "A LoRA step, beside transformers' Trainer with PEFT."
    runs = [r for r in read("training") if r["dtype"] == "bfloat16" and r["cpu"] == "AMD EPYC"]
    speed, memory, count = {}, {}, {}
    for variant in ("ftbook", "trainer", "sft_packed"):
        mine = [r for r in runs if r["variant"] == variant]
        speed[variant] = median(rate for r in mine for rate in r["rates"])
        memory[variant] = median(r["peak_bytes"] for r in mine) / 1e9
        count[variant] = len(mine)
    return [
        "[LoRA on SmolLM2-135M, bfloat16](bench/training.ipynb)",
        f"{speed['ftbook']:.0f} tokens/s, {memory['ftbook']:.1f} GB",
        f"Trainer + PEFT: {speed['trainer']:.0f}, {memory['trainer']:.1f} GB; "
        f"TRL, packed: {speed['sft_packed']:.0f}, {memory['sft_packed']:.1f} GB",
        times(speed["ftbook"] / max(speed["trainer"], speed["sft_packed"])),
        f"CPU, 2 cores; {min(count.values())} runs",
    ]


def gpu_row() -> list[str]:
    "The same step on a GPU, where the lead is memory alone."
    runs = [r for r in read("gpu_steps") if r["kind"] == "lora"]
    ratios = [median(r["seconds"]["peft"]) / median(r["seconds"]["finetune"]) for r in runs]
    memory = [r["above"]["finetune"] / r["above"]["peft"] for r in runs]
    names = " and ".join(r["model"] for r in runs)
    return [
        f"[LoRA step on a GPU, {names}](bench/gpu.ipynb)",
        f"{min(memory):.2f} to {max(memory):.2f} of PEFT's memory",
        "PEFT with PyTorch's own loop",
        f"{min(ratios):.1f} to {max(ratios):.1f}×" + ": no faster" * (min(ratios) < 1),
        f"{runs[0]['device'].removeprefix('NVIDIA ')}; {len(runs[0]['seconds']['peft'])} runs",
    ]


def merging_rows() -> list[list[str]]:
    "Three models of 135 million parameters in one, beside mergekit."
    runs = [r for r in read("merge") if "method" in r]
    rows = []
    for method, name in dict(ties="TIES", dare_ties="DARE-TIES", task_arithmetic="Task arithmetic").items():
        mine = [r for r in runs if r["method"] == method]
        ours, theirs = (median(r[side]["seconds"] for r in mine) for side in ("ours", "theirs"))
        rows.append(
            [
                f"[{name} of three models](bench/merge.ipynb)",
                f"{ours:.1f} s",
                f"mergekit 0.1.5: {theirs:.1f} s",
                times(theirs / ours),
                f"CPU, 2 cores; {len(mine)} rounds",
            ]
        )
    return rows


def duplicates_row() -> list[str]:
    "Near duplicates in 100,000 short texts, beside the fastest library that finds as many."
    runs = [r for r in read("dedup") if r["n"] == 100_000]
    speed, recall = {}, {}
    for library in {r["library"] for r in runs}:
        mine = [r for r in runs if r["library"] == library]
        speed[library] = 100_000 / median(r["seconds"] for r in mine)
        recall[library] = min(r["recall"] for r in mine)
    whole = {k: v for k, v in speed.items() if k not in ("ftbook", "rensa_flags") and recall[k] > 0.99}
    best = max(whole, key=whole.get)
    return [
        "[Near duplicates in 100,000 texts](bench/dedup.ipynb)",
        f"{speed['ftbook']:,.0f} texts/s",
        f"{best.split('_')[0]}: {whole[best]:,.0f}; datasketch: {speed['datasketch']:,.0f}",
        times(speed["ftbook"] / whole[best]),
        f"CPU, 1 core; {sum(r['library'] == 'ftbook' for r in runs)} runs",
    ]


def audit_row() -> list[str]:
    "Faults planted among real rows, and how many the audit finds; there is no rival that looks for all of them."
    runs = {r.get("encoder"): {s["kind"]: s for s in r["scores"]} for r in read("audit") if r["rows"] == 100_000}
    scores, labels = runs["none"].values(), runs["minilm-l6"]["labels.errors"]
    found = sum(round(s["recall"] * s["planted"]) for s in scores)
    return [
        "[Faults planted in 100,000 rows](bench/audit.ipynb)",
        f"{found:,} found, at least {100 * min(s['precision'] for s in scores):.0f} % of what is flagged; "
        f"wrong labels: {100 * labels['recall']:.0f} %, of what is flagged {100 * labels['precision']:.0f} %",
        f"planted: {sum(s['planted'] for s in scores):,} of {len(scores)} kinds, {labels['planted']:,} wrong labels",
        "",
        "CPU, 1 thread; 1 run each",
    ]


def few_labels_row() -> list[str]:
    "Eight labelled rows a class, beside SetFit at its defaults."
    runs = [r for r in read("fewshot") if r.get("shots") == 8 and "accuracy" in r]
    on_gpu = [
        r for r in read("gpu_fewshot") if r["shots"] == 8
    ]  # SetFit again, where its long runs end: accuracy alone
    tasks = sorted({r["task"] for r in runs if r["way"] == "setfit"})

    def by_task(way, what):
        found = {task: {} for task in tasks}
        for r in (on_gpu if what == "accuracy" else []) + runs:
            if r["way"] == way and r["task"] in found:
                found[r["task"]].setdefault(r["seed"], r[what])
        return list(found.values())

    def mean(groups):
        return sum(mean_of(g.values()) for g in groups) / len(groups)

    right = {way: by_task(way, "accuracy") for way in ("ours", "setfit")}
    spent = {way: by_task(way, "cpu_seconds") for way in ("ours", "setfit")}
    ours, theirs = (100 * mean(right[way]) for way in ("ours", "setfit"))
    seeds = sorted(set.intersection(*(set(g) for groups in right.values() for g in groups)))
    gains = [100 * mean_of(a[seed] - b[seed] for a, b in zip(right["ours"], right["setfit"])) for seed in seeds]
    error = t.ppf(0.975, len(gains) - 1) * stdev(gains) / len(gains) ** 0.5
    ratios = [median(b.values()) / median(a.values()) for a, b in zip(spent["ours"], spent["setfit"])]
    return [
        f"[Eight labels a class, {len(tasks)} tasks](bench/fewshot.ipynb)",
        f"{ours:.1f} % right",
        f"SetFit, its defaults: {theirs:.1f} %",
        f"{mean_of(gains):+.1f} ± {error:.1f} points; {min(ratios):.0f} to {max(ratios):.0f}× in processor time",
        f"{len(seeds)} seeds; time on a CPU",
    ]


def memory_row() -> list[str]:
    "Planned memory of a training step beside the measured peak."
    runs = read("memory")
    errors = [abs(r["planned"] / r["measured"] - 1) for r in runs]
    close = sum(e < 0.01 for e in errors)
    return [
        "[Memory of a training step, predicted before loading](bench/memory.ipynb)",
        f"{close} of {len(runs)} plans within 1 %",
        f"the measured peak; worst plan {100 * max(errors):.1f} % off",
        "",
        f"CPU; {len(runs)} configurations",
    ]


def table() -> str:  # Markdown
    "All rows."
    rows = [training_row(), gpu_row(), memory_row(), *merging_rows(), few_labels_row(), duplicates_row(), audit_row()]
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fill(
    text: str,  # Of a cell
) -> str:  # With the table between the comments
    "Put the table in its place."
    return re.sub(f"{START}.*?{END}", lambda _: f"{START}\n{table()}\n{END}", text, flags=re.S)


def main():
    book = json.loads(index.read_text(encoding="utf-8"))
    cells = [c for c in book["cells"] if START in "".join(c["source"])]
    assert len(cells) == 1, f"{index} must have one cell with {START}"
    before = "".join(cells[0]["source"])
    after = fill(before)
    if "--check" in sys.argv:
        sys.exit(0 if after == before else "the front page's table is stale: run `python .ci/answers.py`")
    cells[0]["source"] = after.splitlines(keepends=True)
    index.write_text(json.dumps(book, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
