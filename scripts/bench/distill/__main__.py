"""Distillation: students, losses, healing and stored outputs, each beside what it must beat, over several seeds.

    python -m scripts.bench.distill --model M --train train.txt --text heldout.txt
    python -m scripts.bench.distill --encoder E --sentences s.txt --pairs stsb-dev.tsv --data mnist.npz

`--minutes` is what a training of a language model of half the layers takes; other trainings take their own share of it,
as `scripts/bench/distill/rows.py` says. Every measurement is a line in results.jsonl, so that a run can be cut and goes
on when it is called again. Prints a Markdown table: mean and 95 % interval over the seeds, and the targets.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from scripts.bench.distill.rows import ROWS
from scripts.bench.distill.runs import Budget, Given

T95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, two-sided, by number of seeds
Figures = Mapping[str, Mapping[str, list[float]]]  # row, figure, a value of every seed


@dataclass(frozen=True)
class Target:
    """A figure of a row and what it must reach.

    Attributes:
        row, figure: what is judged.
        limit: a number, or a factor of the other row's figure.
        other: the row that it is beside, or None.
        least: the figure is to be at least that; else at most.
    """

    row: str
    figure: str
    limit: float
    other: str | None = None
    least: bool = False

    def line(self, figures: Figures) -> str | None:
        """The verdict; None where a row was not measured."""
        rows = [self.row, *([self.other] if self.other else [])]
        if any(self.figure not in figures.get(row, {}) for row in rows):
            return None
        values = [mean(figures[row][self.figure]) for row in rows]
        value = values[0] / values[1] if self.other else values[0]
        met = value >= self.limit if self.least else value <= self.limit
        words = f"{'at least' if self.least else 'at most'} {self.limit:g}"
        beside = f" × that of {self.other}" if self.other else ""
        return f"- {self.row}: {self.figure} is {value:.3f}{beside}, {words} is the target: {_met(met)}"


def _met(met: bool) -> str:
    return "met" if met else "**missed**"


HEALED = ("60 % of the weights", "40 % of the neurons", "keep 0.6", "2 bits")
TARGETS = (
    Target("half the layers, kl + hidden", "perplexity", 0.9, "random, cross-entropy"),
    Target("half the layers, kl + hidden", "perplexity", 0.95, "half the layers, cross-entropy"),
    Target("half the layers, kl + hidden", "perplexity", 1.0, "half the layers, kl"),
    *(Target(f"healed: {name}", "KL won back", 0.5, least=True) for name in HEALED),
    *(Target(f"healed by blocks: {name}", "KL won back", 1 / 3, least=True) for name in HEALED),
    Target("encoder of 3 layers", "Spearman", 0.85, least=True),
    Target("encoder of 3 layers", "time beside the whole", 0.55),
    Target("perceptron from its teacher", "error %", 1.0, "perceptron on labels alone"),
    Target("mean teacher on 1,000 labels", "error %", 1.0, "1,000 labels alone"),
    Target("stored outputs", "KL beside the teacher", 1.02),
    Target("stored outputs", "speed beside the teacher", 1.3, least=True),
    Target("training loop", "speed beside a bare loop", 0.9, least=True),
)


def spread(values: Sequence[float]) -> str:
    """The mean, with half of its 95 % interval where there are several seeds."""
    if len(values) < 2:
        return f"{values[0]:.4g}"
    half = T95.get(len(values), 1.96) * stdev(values) / math.sqrt(len(values))
    return f"{mean(values):.4g} ± {half:.2g}"


def known(path: Path) -> dict[tuple[str, int, float], dict[str, float]]:
    """What was measured before, by row, seed and minutes."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records = [json.loads(line) for line in lines]
    return {(each["row"], each["seed"], each["minutes"]): each["figures"] for each in records}


def measured(given: Given, store: Path, names: Sequence[str], seeds: int, minutes: float) -> Figures:
    """Figures of the rows that the inputs are given for; a line in the table as each row is done."""
    before = known(store)
    figures: dict[str, dict[str, list[float]]] = {}
    for name in names:
        row = ROWS[name]
        if not all(getattr(given, need) is not None for need in row.needs):
            continue
        for seed in range(seeds):
            key = (name, seed, minutes)
            if key not in before:
                start = time.perf_counter()
                before[key] = row.measure(given, Budget(minutes * row.share, seed))
                record = {"row": name, "seed": seed, "minutes": minutes, "figures": before[key]}
                record["seconds"] = time.perf_counter() - start
                with store.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            for figure, value in before[key].items():
                figures.setdefault(name, {}).setdefault(figure, []).append(value)
        told = ", ".join(f"{figure} {spread(values)}" for figure, values in figures[name].items())
        print(f"| {name} | {minutes * row.share:.3g} | {seeds} | {told} |", flush=True)
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--model", type=Path, help="folder of a causal language model")
    parser.add_argument("--train", type=Path, help="text that it learns from")
    parser.add_argument("--text", type=Path, help="held-out text")
    parser.add_argument("--encoder", type=Path, help="folder of a sentence encoder")
    parser.add_argument("--sentences", type=Path, help="lines that its student learns from, without labels")
    parser.add_argument("--pairs", type=Path, help="pairs of sentences with scores, as the STS benchmark has them")
    parser.add_argument("--data", type=Path, help="an .npz with train_images, test_images and labels")
    parser.add_argument("--minutes", type=float, default=20.0, help="of a training of half the layers")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=400, help="of 256 tokens of the held-out text")
    parser.add_argument("--samples", type=int, default=128, help="of 256 tokens, to calibrate on")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="names of rows")
    asked = parser.parse_args(arguments)
    folder = asked.folder / "distill"
    folder.mkdir(parents=True, exist_ok=True)
    paths = (asked.model, asked.train, asked.text, asked.encoder, asked.sentences, asked.pairs, asked.data)
    for path in filter(None, paths):
        if not path.exists():
            sys.exit(f"error: {path} does not exist")
    given = Given(folder, *(path and path.resolve() for path in paths), asked.windows, asked.samples)
    print("| row | minutes | seeds | figures |\n|---|---:|---:|---|", flush=True)
    figures = measured(given, folder / "results.jsonl", asked.only, asked.seeds, asked.minutes)
    print("\n" + "\n".join(line for target in TARGETS if (line := target.line(figures)) is not None))


if __name__ == "__main__":
    main()
