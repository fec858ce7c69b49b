"""Draw nbs/images/quickstart.svg, the picture on the front page, from what the quickstart measured.

    python .ci/picture.py RUN/report.json

keeps a report.json that `ftbook quickstart` wrote as nbs/bench/results/quickstart.jsonl and draws it; without a file, what is
kept is drawn. Until there is one, the picture shows arithmetic instead: how few weights a LoRA trains.
"""

import json
import sys
from math import sqrt
from pathlib import Path

from ftbook.files import write_text
from ftbook.results import read_results, result_lines
from ftbook.show.bar_chart import bars
from ftbook.show.charts import Frame, plot

nbs = Path(__file__).resolve().parent.parent / "nbs"


def interval(
    share: float,  # Share of answers that were right
    n: int,  # Answers
    z: float = 1.96,  # Standard errors to either side: 95 %
) -> tuple[float, float]:  # Wilson's interval
    "Say how far chance alone could move an accuracy."
    mid, half = share + z * z / (2 * n), z * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (mid - half) / (1 + z * z / n), (mid + half) / (1 + z * z / n)


def draw_report(
    report: dict,  # What the quickstart measured
):  # A chart of accuracy before and after
    "Draw what fine-tuning did to the accuracy."
    names = {"before": report["accuracy_before"], "after fine-tuning": report["accuracy_after"]}
    return bars(
        names,
        errors={k: interval(v, report["n_eval"]) for k, v in names.items()},
        x_range=(0, 1),
        marks={"chance": 0.5},
        title=f"SmolLM2-135M reads movie reviews: {report['seconds'] / 60:.1f} minutes in all",
        x_label=f"accuracy on {report['n_eval']:,} unseen reviews, 95 % intervals",
        width=560,
    )


def draw_placeholder():  # A chart of trainable weights by rank
    "Draw how many weights a LoRA on every linear layer of SmolLM2-135M trains."
    d, kv, ff, layers, total = 576, 192, 1536, 30, 134_515_008
    widths = 2 * (d + d) + 2 * (d + kv) + 3 * (d + ff)  # in + out of q, o; k, v; gate, up, down
    ranks = [1, 2, 4, 8, 16, 32, 64]
    return plot(
        {"LoRA": (ranks, [100 * layers * r * widths / total for r in ranks])},
        x_label="rank",
        y_label="% of the model's weights",
        title="What a LoRA trains, of SmolLM2-135M's 134,515,008 weights",
        frame=Frame(log_x=True, height=300),
    )


def chart():  # The picture, measured or a placeholder
    "Draw what is kept."
    measured = nbs / "bench/results/quickstart.jsonl"
    return draw_report(read_results(measured)) if measured.exists() else draw_placeholder()


if __name__ == "__main__":
    for report in sys.argv[1:]:
        facts = json.loads(Path(report).read_text(encoding="utf-8"))
        write_text(nbs / "bench/results/quickstart.jsonl", "".join(result_lines(facts)))
    picture = nbs / "images/quickstart.svg"
    picture.parent.mkdir(exist_ok=True)
    chart().save(picture)
    print(picture.name)
