"""What a metric gives for one figure: a value with its interval, and how it differs from a baseline's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Change:
    """How a figure differs from a baseline's on the same samples.

    Attributes:
        value: the figure over the baseline's, or less the baseline's.
        low, high: its 95% interval, from the differences of the samples; None where there are too few for one.
        kind: which of the two.
        interval: how the interval was computed.
    """

    value: float
    low: float | None
    high: float | None
    kind: Literal["ratio", "difference"]
    interval: str


class PairedSamples(ABC):
    """What a figure was computed of: with a baseline's of the same samples it says how far the two differ."""

    @abstractmethod
    def change(self, baseline: Any) -> Change:
        """Compare with a baseline's, of the same class and as many."""


@dataclass(frozen=True)
class Estimate:
    """One measured figure.

    Attributes:
        value: the figure.
        low, high: its 95% interval; None where there are too few samples for one.
        n: samples behind it.
        unit: what a sample is: "tokens", "pairs", "images".
        interval: how the interval was computed.
        baseline: the same figure of the checkpoint compared against, or None.
        change: how the two differ on the same samples, where samples are known.
        samples: what it was computed of; no part of a report.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    unit: str
    interval: str
    baseline: float | None = None
    change: Change | None = None
    samples: PairedSamples | None = field(default=None, repr=False, compare=False)

    def beside(self, other: Estimate) -> Estimate:
        """Add a baseline's value of the same figure, and how the two differ."""
        own, theirs = self.samples, other.samples
        change = None if own is None or theirs is None else own.change(theirs)
        return replace(self, baseline=other.value, change=change)

    def plain(self) -> dict[str, Any]:
        """Give the figure as the report stores it."""
        told = {own.name: getattr(self, own.name) for own in fields(self) if own.name != "samples"}
        told["change"] = None if self.change is None else _given(asdict(self.change))
        return _given(told)


def _given(told: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in told.items() if value is not None}
