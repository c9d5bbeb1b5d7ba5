"""What calibration on drawn tokens costs against real text, on a language model and a sentence encoder.

    python -m scripts.bench.drawn --model M --calibration calibration.txt --text heldout.txt
        --encoder E --sentences train.txt --held heldout-sentences.txt

Each method runs on real text, on a little of it, on drawn tokens, and on drawn tokens with that little text; beside
them stands its relative that reads no data. Prints a Markdown table: how far the outputs are from the original's on
held-out text, with 95 % intervals. No text that is calibrated on is measured on.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAMPLES = 64  # of real text, and drawn
METHODS: dict[str, tuple[str, tuple[str, ...], str, tuple[str, ...]]] = {  # with data, its edits; without, its edits
    "3 bits": ("quantize/gptq-w3", ("method.group_size=64",), "quantize/rtn-w3", ("method.group_size=64",)),
    "half zeros": ("prune/sparsegpt-50", (), "prune/magnitude-50", ()),
}


@dataclass(frozen=True)
class Subject:
    """A model and the texts that it is calibrated and measured on.

    Attributes:
        kind: language model, or sentence encoder.
        model: Hugging Face folder.
        calibration, held: files of text.
        length: tokens in a sample.
        few: samples that are "a little text".
        recipe: how it is measured.
        edits: of that recipe.
        figure: what is printed of the measurement.
    """

    kind: str
    model: Path
    calibration: Path
    held: Path
    length: int
    few: int
    recipe: str
    edits: tuple[str, ...]
    figure: str


def subjects(given: argparse.Namespace) -> Iterator[Subject]:
    """The models that are given."""
    if given.model is not None:
        section = "quality.perplexity"
        edits = (f"{section}.samples={given.windows}", f"{section}.length=256", "kernels=reference")
        texts = (given.calibration, given.text)
        yield Subject("language model", given.model, *texts, 256, 2, "eval/language-model", edits, "kl")
    if given.encoder is not None:
        section = "quality.embedding"
        edits = (f"{section}.samples={given.embedded}", "kernels=reference")
        texts = (given.sentences, given.held)
        yield Subject(
            "sentence encoder", given.encoder, *texts, 32, 16, "eval/sentence-encoder", edits, "embedding_cosine"
        )


def calibrations(subject: Subject) -> dict[str, tuple[str, ...]]:
    """Edits of a recipe for each kind of calibration data."""
    length = f"calibration.length={subject.length}"
    text = f"text={subject.calibration}"
    return {
        "text": (text, f"calibration.samples={SAMPLES}", length),
        "a little text": (text, f"calibration.samples={subject.few}", length),
        "drawn": (f"drawn={SAMPLES}", length),
        "drawn and a little text": (f"drawn={SAMPLES}", text, f"calibration.samples={subject.few}", length),
    }


def jobs(subject: Subject) -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
    """Name, calibration, recipe and edits of every line."""
    for name, (recipe, edits, plain, plain_edits) in METHODS.items():
        yield name, "none", plain, plain_edits
        for data, more in calibrations(subject).items():
            yield name, data, recipe, (*edits, *more)


def compressed(subject: Subject, recipe: str, edits: tuple[str, ...], out: Path) -> tuple[float, int]:
    """Run a step; its seconds, and the samples that it was calibrated on."""
    from aicompress import recipe as recipes
    from aicompress.pipeline import steps
    from aicompress.pipeline.step.options import Options
    from aicompress.pipeline.step.output import Destination

    command = recipe.partition("/")[0]
    start = time.perf_counter()
    planned = steps.make_plan(subject.model, Destination(out), recipes.load(recipe, command, edits), command)
    report = steps.run(planned, Options(latency="off"))
    samples = sum(source["samples"] for source in report.calibration.get("data", []))
    return time.perf_counter() - start, samples


def quality(subject: Subject, out: Path) -> dict[str, dict[str, Any]]:
    """All figures of an output beside its original, on held-out text."""
    from aicompress.pipeline.evaluation.run import evaluate
    from aicompress.recipe.evaluation import load

    edits = (f"text={subject.held}", "latency=null", *subject.edits)
    report = evaluate(str(out), [str(subject.model)], load(subject.recipe, edits))
    return dict(report.quality)


def measured(subject: Subject, out: Path) -> dict[str, Any]:
    """How far an output is from its original on held-out text."""
    return quality(subject, out)[subject.figure]


def main(arguments: list[str] | None = None) -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--model", type=Path, help="folder of a causal language model")
    parser.add_argument("--calibration", type=Path, help="text to calibrate it on")
    parser.add_argument("--text", type=Path, help="held-out text")
    parser.add_argument("--windows", type=int, default=100, help="windows of it that are measured on")
    parser.add_argument("--encoder", type=Path, help="folder of a sentence encoder")
    parser.add_argument("--sentences", type=Path, help="sentences to calibrate it on, one a line")
    parser.add_argument("--held", type=Path, help="held-out sentences")
    parser.add_argument("--embedded", type=int, default=500, help="of them that are measured on")
    options = parser.parse_args(arguments)
    chosen = list(subjects(options))
    if not chosen or any(path is None for each in chosen for path in (each.calibration, each.held)):
        sys.exit("error: give --model with --calibration and --text, --encoder with --sentences and --held, or both")
    out = options.folder / "drawn"
    print("| model | compressed to | calibrated on | samples | held out: | 95 % interval | n | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for subject in chosen:
        for name, data, recipe, edits in jobs(subject):
            shutil.rmtree(out, ignore_errors=True)
            seconds, samples = compressed(subject, recipe, edits, out)
            found = measured(subject, out)
            figure = (
                f"{subject.figure} {found['value']:.4g} | {found['low']:.4g} to {found['high']:.4g} | {found['n']:,}"
            )
            print(f"| {subject.model.name} | {name} | {data} | {samples} | {figure} | {seconds:.0f} |", flush=True)
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
