"""What a metric is: a section of a recipe, the outputs it reads, and the figures it makes of them, with intervals."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Generic, Literal, TypeVar

from aicompress.data.section import Data
from aicompress.metrics.outputs import ModelOutputs


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


Better = Literal["lower", "higher"]
Problem = tuple[str, str]  # a message and a hint
ConfigT = TypeVar("ConfigT", bound=Data)
OutputsT = TypeVar("OutputsT", bound=ModelOutputs)


@dataclass(frozen=True)
class FigureSpec:
    """A figure that a metric gives.

    Attributes:
        name: in reports and gates; no other metric has it.
        better: which way is better.
        compared: it tells a model from a baseline, so without a baseline there is none.
    """

    name: str
    better: Better
    compared: bool = False


@dataclass(frozen=True)
class MeasuredFigures:
    """Figures by name.

    Attributes:
        alone: of each model by itself, the tested one first.
        against: of the tested model against each baseline, in their order; none where no figure is a comparison.
    """

    alone: tuple[Mapping[str, Estimate], ...]
    against: tuple[Mapping[str, Estimate], ...] = ()


def any_number(samples: int, config: Data) -> Problem | None:
    """Accept any number of samples: the check of most metrics."""
    return None


@dataclass(frozen=True)
class Metric(Generic[ConfigT, OutputsT]):
    """What `eval` can measure of outputs.

    Attributes:
        name: the key of its section under `quality` in a recipe.
        summary: one line for the schema of recipes: which models, and what is measured.
        config: the class of its section: the data that it is measured on, and its own parameters.
        reads: the outputs that it needs of every model.
        figures: all figures that it may give, in the order reports show them.
        measure: (outputs in batches, config, seed) -> figures. A pure function; the seed is for resampling.
        check: (number of samples, config) -> what makes the measurement impossible, as (message, hint), or None.
    """

    name: str
    summary: str
    config: type[ConfigT]
    reads: type[OutputsT]
    figures: tuple[FigureSpec, ...]
    measure: Callable[[Iterable[OutputsT], ConfigT, int], MeasuredFigures]
    check: Callable[[int, ConfigT], Problem | None] = any_number

    @property
    def needs_baseline(self) -> bool:
        """Tell whether a model by itself has no figure."""
        return all(figure.compared for figure in self.figures)

    def entries(self, measured: MeasuredFigures) -> list[dict[str, Any]]:
        """List the figures by name as a report stores them: for each baseline, or once where there is none.

        Raises:
            TypeError: the metric measured a figure that it does not declare.
        """
        own, *baselines = measured.alone
        rows: list[dict[str, Estimate]] = [
            {**{name: estimate.beside(base[name]) for name, estimate in own.items()}, **against}
            for base, against in zip(baselines, measured.against or [{}] * len(baselines), strict=True)
        ] or [dict(own)]
        undeclared = {name for row in rows for name in row} - {figure.name for figure in self.figures}
        if undeclared:
            raise TypeError(f"metric {self.name!r} does not declare {', '.join(sorted(undeclared))}")
        return [
            {f.name: {**row[f.name].plain(), "better": f.better} for f in self.figures if f.name in row} for row in rows
        ]
