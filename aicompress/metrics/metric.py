"""What a metric is: a section of a recipe, the outputs it reads, and the figures it makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from aicompress.data.section import Data
from aicompress.metrics.estimate import Estimate
from aicompress.metrics.outputs import ModelOutputs

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
