"""What the plans of a kind of steps have in common: input, output, layers, and what a dry run prints of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from aicompress.checkpoint import Checkpoint
from aicompress.layer import Kind, LayerInfo
from aicompress.pipeline.step.dry_run import summarize
from aicompress.pipeline.step.output import Output
from aicompress.recipe import Recipe
from aicompress.recipe.made import ExportRecipe
from aicompress.report.model import LayerRow
from aicompress.report.plan import PlanRow, PlanSummary


@dataclass(frozen=True)
class StepPlan(ABC):
    """A step that can be run, or printed.

    Attributes:
        checkpoint: the input.
        recipe: what to do.
        output: every file and byte of the output.
        kinds: what the model definition says of the parameters.
        infos: every layer of the input.
        warnings: what the user should know.
    """

    checkpoint: Checkpoint
    recipe: Recipe | ExportRecipe
    output: Output
    kinds: Mapping[str, Kind | None] | None
    infos: tuple[LayerInfo, ...]
    warnings: tuple[str, ...]

    @abstractmethod
    def rows(self, seconds: Mapping[str, float] | None = None) -> tuple[LayerRow, ...]:
        """A row for each layer of the input; `seconds` are what its parameter took."""

    @property
    def stored(self) -> dict[str, str]:
        """The form of each layer in the input."""
        return {info.name: info.stored for info in self.infos}

    def summary(self) -> PlanSummary:
        """What a dry run prints."""
        rows, stored = self.rows(), self.stored
        shown = [
            PlanRow(r.name, r.kind, r.rule, stored[r.name], r.form, r.detail, r.bytes_before, r.bytes_after)
            for r in rows
            if r.method != "-"
        ]
        return summarize(self.output, self.checkpoint, shown, len(rows) - len(shown), self.warnings)
