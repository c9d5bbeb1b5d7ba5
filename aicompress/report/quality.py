"""The quality section of a report: what was measured, how sure it is, which way is better, and all of it as a table."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from aicompress.report import numbers
from aicompress.report.model import Report
from aicompress.report.numbers import DASH
from aicompress.report.table import Cell, Table, columns

Better = Literal["lower", "higher"]

_LOWER = frozenset({"kl", "perplexity", "ppl", "loss", "nll", "mse", "mae", "rmse", "wer", "cer", "error", "bpb"})
_HIGHER = frozenset(
    {"accuracy", "agreement", "top1", "spearman", "pearson", "similarity", "cosine", "f1", "mcc", "bleu", "rouge"}
)


@dataclass(frozen=True)
class ReportedChange:
    """How a figure differs from the baseline's on the same samples.

    Attributes:
        value: the figure over the baseline's, or less it.
        low, high: the interval of that, where one was computed.
        ratio: which of the two.
    """

    value: float
    low: float | None
    high: float | None
    ratio: bool


@dataclass(frozen=True)
class Figure:
    """One measured quality.

    Attributes:
        value: the measurement; None where it came out as no finite number.
        low, high: its interval, where one was computed.
        n: how many samples, tokens or pairs it was measured on.
        baseline: the same figure of the checkpoint compared against.
        better: which way is better; None where the name does not say.
        change: how it differs from the baseline's, where samples of both are known.
        kernels: what the model's compressed layers ran on; empty where that is not said.
        baseline_kernels: the same of the baseline.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int | None
    baseline: float | None
    better: Better | None
    change: ReportedChange | None = None
    kernels: str = ""
    baseline_kernels: str = ""

    @property
    def ran_on(self) -> str:
        """What the model ran on, and the baseline where that is another: "4-bit kernel; baseline: stored numbers"."""
        if self.baseline_kernels in ("", self.kernels):
            return self.kernels
        return f"{self.kernels}; baseline: {self.baseline_kernels}"


def figures(quality: Mapping[str, Any]) -> dict[str, Figure]:
    """Every figure by its dotted name: a plain number, {"value": ...}, or a section that holds more of them."""
    by_name: dict[str, Figure] = {}
    for name, entry in quality.items():
        if isinstance(entry, Mapping) and "value" not in entry:
            by_name |= {f"{name}.{inner}": figure for inner, figure in figures(entry).items()}
        else:
            by_name[name] = _figure(name, entry if isinstance(entry, Mapping) else {"value": entry})
    return by_name


def finite(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def direction(name: str) -> Better | None:
    """Tell which way is better by a name, where the report does not state it: "sts_spearman" is better higher."""
    words = set(re.split(r"[^a-z0-9]+", name.rpartition(".")[2].lower()))
    lower, higher = bool(words & _LOWER), bool(words & _HIGHER)
    if lower == higher:
        return None
    return "lower" if lower else "higher"


def _figure(name: str, entry: Mapping[str, Any]) -> Figure:
    better = entry.get("better")
    n = entry.get("n")
    return Figure(
        value=finite(entry["value"]),
        low=finite(entry.get("low")),
        high=finite(entry.get("high")),
        n=n if isinstance(n, int) else None,
        baseline=finite(entry.get("baseline")),
        better=better if better in ("lower", "higher") else direction(name),
        change=_change(entry.get("change")),
        kernels=str(entry.get("kernels", "")),
        baseline_kernels=str(entry.get("baseline_kernels", "")),
    )


def _change(entry: Any) -> ReportedChange | None:
    if not isinstance(entry, Mapping) or (value := finite(entry.get("value"))) is None:
        return None
    return ReportedChange(value, finite(entry.get("low")), finite(entry.get("high")), entry.get("kind") == "ratio")


def table(report: Report) -> Table:
    """Every quality figure with its interval, sample count and, where measured, the baseline's.

    What differs on the same samples has an interval of its own: those of two figures say little of their difference.
    """
    by_name = figures(report.quality)
    against = any(figure.baseline is not None for figure in by_name.values())
    paired = any(figure.change is not None for figure in by_name.values())
    named = any(figure.kernels for figure in by_name.values())
    headings = columns(
        "figure", *(["baseline:"] if against else []), "value:", "interval:",
        *(["against the baseline:"] if paired else []), "n:", "better", *(["ran on"] if named else []),
    )  # fmt: skip
    rows = []
    for name, figure in by_name.items():
        baseline = [Cell(numbers.number(figure.baseline), figure.baseline)] if against else []
        differs = None if figure.change is None else figure.change.value
        change = [Cell(against_baseline(figure), differs)] if paired else []
        rows.append(
            (
                Cell(name, name, code=True),
                *baseline,
                Cell(numbers.number(figure.value), figure.value),
                Cell(interval(figure)),
                *change,
                Cell(numbers.number(figure.n), figure.n),
                Cell(figure.better or DASH),
                *([Cell(figure.ran_on or DASH)] if named else []),
            )
        )
    return Table("Quality", headings, tuple(rows))


def interval(figure: Figure) -> str:
    """The interval of a figure as "low to high"."""
    if figure.low is None or figure.high is None:
        return DASH
    return f"{numbers.number(figure.low)} to {numbers.number(figure.high)}"


def against_baseline(figure: Figure) -> str:
    """How a figure differs from the baseline's on the same samples: "1.0016× (1.0006 to 1.0026)", "−0.01 (...)"."""
    change = figure.change
    return (
        DASH if change is None else numbers.spread(change.value, change.low, change.high, "×" if change.ratio else "")
    )
