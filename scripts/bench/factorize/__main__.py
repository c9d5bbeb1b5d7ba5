"""Low rank: our methods, plain and whitened singular value decomposition on one language model, judged alike.

    python -m scripts.bench.factorize --model M --calibration calibration.txt --text heldout.txt --text other.txt

Every linear layer of the decoder gets the same share of its parameters, or all together do (`ranks: auto`). The factors
of some rows are rounded to 4 bits, and so is the original: by the same recipe, which makes the factors smaller than the
rounded original, and with as many scales as the bytes of that one allow. Prints a Markdown table: KL to the original on
each held-out text with its 95 % interval, by how much the logarithm of perplexity grows there, megabytes of the weight
files, the processor's seconds for the whole step, and the targets. No text that is calibrated on is measured on. A
second table has times of factors beside those of their multiply-adds, and of their products alone.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aicompress.checkpoint import Checkpoint
from scripts.bench.commands import step
from scripts.bench.drawn import Subject, quality
from scripts.bench.factorize import svd_llm, times

LENGTH = 256  # tokens of a sample
REFERENCE = "SVD-LLM v1"
OURS: dict[str, dict[str, Any]] = {
    "svd": {"method": {"name": "svd"}},
    "activation": {"method": {"name": "activation"}},
    "fisher": {"method": {"name": "fisher"}},
    "whitened": {"method": {"name": "whitened"}},
    "dictionary": {"method": {"name": "dictionary"}},
    "stack": {"method": {"name": "stack"}},
    "two_sided": {"method": {"name": "two_sided"}},
    "two_sided ranks: auto": {"method": {"name": "two_sided", "ranks": "auto"}},
    "two_sided effort: best": {"method": {"name": "two_sided"}, "effort": "best"},
    "two_sided ranks: auto effort: best": {"method": {"name": "two_sided", "ranks": "auto"}, "effort": "best"},
}
FIRST = "two_sided"
FOUR_BITS: dict[str, dict[str, Any]] = {
    "rtn, 4 bits": {"method": {"name": "rtn", "bits": 4, "group_size": 64, "range": "mse", "pad": True}},
    "gptq, 4 bits": {"method": {"name": "gptq", "bits": 4, "group_size": 64, "pad": True}},
}
CHAINS = {f"{FIRST}, then {name}": name for name in FOUR_BITS}
FINER = {f"{chain}, groups of 16": name for chain, name in CHAINS.items()}  # at keep 0.8 nearly the original's bytes
ROUNDED = {**CHAINS, **FINER}  # chains, each with the row of its second step alone
ADDED = 1.1  # of the sum of both steps' KL, at most, is the chain's
TARGETS: Mapping[str, tuple[float, str]] = {  # at most so much of another row's KL
    "two_sided": (0.82, REFERENCE),
    "two_sided ranks: auto": (0.8, "two_sided"),
    "two_sided effort: best": (0.41, REFERENCE),
}
LARGE = 50_000_000  # parameters of a model from which on log-perplexity is judged; KL is judged of smaller ones
GROWTH: Mapping[str, float] = {  # at most so much of the reference's growth of log-perplexity
    "two_sided": 0.7,
    "two_sided effort: best": 0.4,
    "two_sided ranks: auto effort: best": 0.4,
}


def compressed(given: argparse.Namespace, name: str, keep: float, out: Path) -> float:
    """Run a step; the processor's seconds."""
    shutil.rmtree(out, ignore_errors=True)
    start = time.process_time()
    if name == REFERENCE:
        svd_llm.compress(given.model, given.calibration, given.samples, LENGTH, keep, out)
        return time.process_time() - start
    data = {"text": str(given.calibration.resolve()), "samples": given.samples, "length": LENGTH}
    if name in FOUR_BITS:
        step("quantize", given.model, FOUR_BITS[name], out, data)
    else:
        sections, chained = OURS[FIRST if name in ROUNDED else name], name in ROUNDED
        made = {**sections, "method": {**sections["method"], "keep": keep}}
        factors = out.with_name("factors") if chained else out
        shutil.rmtree(factors, ignore_errors=True)
        step("factorize", given.model, made, factors, data)
        if chained:
            step("quantize", factors, _second(name), out, data)
            shutil.rmtree(factors)
    return time.process_time() - start


def _second(chain: str) -> dict[str, Any]:
    """The recipe's sections of a chain's second step."""
    sections = FOUR_BITS[ROUNDED[chain]]
    return {**sections, "method": {**sections["method"], "group_size": 16}} if chain in FINER else sections


def size(name: str, out: Path) -> str:
    """Megabytes of the weight files; the reference writes the products of its factors."""
    return "–" if name == REFERENCE else f"{sum(file.stat().st_size for file in out.glob('*.safetensors')) / 1e6:.2f}"


def divergences(given: argparse.Namespace, out: Path) -> list[dict[str, Any]]:
    """KL to the original on every held-out text, and under `growth` that of log-perplexity."""
    section = "quality.perplexity"
    edits = (f"{section}.samples={given.windows}", f"{section}.length={LENGTH}", "kernels=reference")
    subjects = [
        Subject("language model", given.model, given.calibration, text, LENGTH, 0, "eval/language-model", edits, "kl")
        for text in given.text
    ]
    found = [quality(subject, out) for subject in subjects]
    worse = [each["perplexity"]["value"] / each["perplexity"]["baseline"] for each in found]
    return [{**each["kl"], "growth": math.log(ratio)} for each, ratio in zip(found, worse, strict=True)]


def verdicts(known: Mapping[tuple[str, float], Sequence[dict[str, Any]]], large: bool) -> list[str]:
    """A line for every target whose rows were measured, by the mean over the texts.

    Args:
        known: figures by row.
        large: the model is large enough to be judged by its log-perplexity.
    """
    means = {row: sum(kl["value"] for kl in figures) / len(figures) for row, figures in known.items()}
    grown = {row: sum(kl["growth"] for kl in figures) / len(figures) for row, figures in known.items()}
    lines = []
    for (name, keep), value in means.items():
        limit, other = TARGETS.get(name, (0.0, ""))
        if (other, keep) in means and not large:
            ratio = value / means[other, keep]
            told = "met" if ratio <= limit else "**missed**"
            lines.append(f"- {name}, keep {keep}: {ratio:.2f} × {other}, at most {limit} is the target: {told}")
        if name in GROWTH and (REFERENCE, keep) in grown and large:
            ratio = grown[name, keep] / grown[REFERENCE, keep]
            told = "met" if ratio <= GROWTH[name] else "**missed**"
            what = f"{ratio:.2f} × the growth of log-perplexity of {REFERENCE}"
            lines.append(f"- {name}, keep {keep}: {what}, at most {GROWTH[name]} is the target: {told}")
        rounded = ROUNDED.get(name, "")
        if {(FIRST, keep), (rounded, keep)} <= means.keys():
            ratio = value / (means[FIRST, keep] + means[rounded, keep])
            told = "met" if ratio <= ADDED else "**missed**"
            lines.append(f"- {name}, keep {keep}: {ratio:.2f} × the sum of both, at most {ADDED} is the target: {told}")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model")
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate it on")
    parser.add_argument("--text", type=Path, action="append", required=True, help="held-out text; may be repeated")
    parser.add_argument("--samples", type=int, default=128, help="of 256 tokens, to calibrate on")
    parser.add_argument("--windows", type=int, default=100, help="of 256 tokens of each text, that are measured on")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6], help="shares of the parameters")
    parser.add_argument("--only", nargs="+", default=[REFERENCE, *OURS, *FOUR_BITS, *ROUNDED], help="names of rows")
    given = parser.parse_args(arguments)
    out, known = given.folder / "factorize", {}
    large = sum(math.prod(spec.shape) for spec in Checkpoint.open(given.model).parameters().values()) >= LARGE
    head = " | ".join(f"KL, {text.stem} | 95 % interval | log-perplexity" for text in given.text)
    print(f"| keep | method | {head} | MB | seconds |")
    print(f"|---|---|{'---:|---|---:|' * len(given.text)}---:|---:|", flush=True)
    for keep in given.keep:
        for name in given.only:
            seconds = compressed(given, name, keep, out)
            known[name, keep] = divergences(given, out)
            cells = [
                f"{kl['value']:.4f} | {kl['low']:.4f} to {kl['high']:.4f} | {kl['growth']:+.4f}"
                for kl in known[name, keep]
            ]
            print(f"| {keep} | {name} | {' | '.join(cells)} | {size(name, out)} | {seconds:.0f} |", flush=True)
    shutil.rmtree(out, ignore_errors=True)
    print("\n".join(["", *verdicts(known, large), "", *times.table()]))


if __name__ == "__main__":
    main()
