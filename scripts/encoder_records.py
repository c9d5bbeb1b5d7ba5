"""Make the smallest files of a sentence encoder, and compare their agreement with people's scores to the original's.

    python -m scripts.encoder_records --encoder all-MiniLM-L6-v2 --pairs stsb-dev.tsv

Every file is made by commands of `aicompress` without any text, and judged on sentence pairs in the layout of the STS
benchmark. A step whose output is there is not run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.lenet.commands import run_command

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        recipes: of the steps.
        most: bytes of the weight file, and points of Spearman × 100 lost, that it may take.
        known: the best that is known, in words.
    """

    recipes: tuple[str, ...]
    most: tuple[int, float]
    known: str


ROWS = (
    Row(("quantize/watersic-encoder",), (9_500_000, 0.3), "13.55 MB (q4_0)"),
    Row(("prune/vocabulary-english", "quantize/watersic-encoder-small"), (6_500_000, 0.3), "none known under 10 MB"),
    Row(("prune/vocabulary-english", "quantize/watersic-encoder-smallest"), (5_000_000, 2.1), "none known"),
)
HEAD = "| recipes | bytes | Spearman × 100 | difference | to reach | | known |\n|---|---:|---|---|---|---|---|"


def made(row: Row, encoder: Path, folder: Path) -> Path:
    """Run the steps of a row."""
    current = encoder
    for recipe in row.recipes:
        step, _, name = recipe.partition("/")
        out = folder / name
        if not out.is_dir():
            run_command(step, str(current), str(out), "-r", recipe, "--latency", "off", "--quiet")
        current = out
    return current


def judged(model: Path, encoder: Path, pairs: Path) -> dict[str, Any]:
    """Spearman's correlation with people's scores as a report has it, and how it differs from the original's."""
    out = model.with_name(f"{model.name}-pairs")
    if not (out / "report.json").is_file():
        settings = ["--set", f"quality.similarity.pairs={pairs.absolute()}", "--set", "latency=null"]
        options = ["--against", str(encoder), "-r", "eval/sts", "-o", str(out), *settings, "--quiet"]
        run_command("eval", str(model), *options)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    figure: dict[str, Any] = report["quality"]["similarity"]
    return figure


def line(row: Row, size: int, figure: dict[str, Any]) -> str:
    """One row of the table: met, or missed."""
    value, change = (_in_words(each) for each in (figure, figure["change"]))
    met = size <= row.most[0] and 100 * figure["change"]["value"] >= -row.most[1]
    return (
        f"| {', '.join(row.recipes)} | {size:,} | {value} | {change} | {row.most[0]:,}, −{row.most[1]} "
        f"| {'met' if met else 'missed'} | {row.known} |"
    )


def _in_words(figure: dict[str, Any]) -> str:
    return f"{100 * figure['value']:.2f} ({100 * figure['low']:.2f} to {100 * figure['high']:.2f})"


def table(encoder: Path, pairs: Path, folder: Path) -> Iterator[str]:
    """All rows, each made when it is asked for."""
    yield HEAD
    for row in ROWS:
        model = made(row, encoder, folder)
        yield line(row, (model / WEIGHTS).stat().st_size, judged(model, encoder, pairs))


def main(arguments: list[str] | None = None) -> None:
    """Make every file and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--pairs", type=Path, required=True, help="sentence pairs with scores: stsb-dev.tsv")
    parser.add_argument("--folder", type=Path, default=Path("build/encoder"))
    options = parser.parse_args(arguments)
    for text in table(options.encoder, options.pairs, options.folder):
        print(text, flush=True)


if __name__ == "__main__":
    main()
