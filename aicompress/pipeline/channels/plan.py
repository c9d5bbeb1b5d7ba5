"""A planned removal of channels: what stays of every layer, and every byte of the output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from aicompress.layer import LayerInfo
from aicompress.methods.channels import ChannelSettings
from aicompress.model.channels.cut import Kept, kept_places
from aicompress.model.channels.graph import ChannelGroup, Fixed
from aicompress.pipeline.channels.selection import ChannelChoice
from aicompress.pipeline.step.options import Progress
from aicompress.pipeline.step.plan import StepPlan
from aicompress.recipe import Recipe
from aicompress.report.model import LayerRow
from aicompress.report.plan import PlanSummary
from aicompress.weights import Dense


@dataclass(frozen=True)
class ChannelPlan(StepPlan):
    """A removal of channels that can be run, or printed.

    Attributes:
        choice: chooses the channels that stay, of a network with its weights in float32.
        groups: each group of channels with the units that stay.
        kept: what stays of every layer that loses something.
        fixed: layers whose channels cannot be removed.
    """

    recipe: Recipe
    choice: ChannelChoice
    groups: tuple[tuple[ChannelGroup, list[int]], ...]
    kept: Mapping[str, Kept]
    fixed: tuple[Fixed, ...]

    @property
    def settings(self) -> ChannelSettings:
        """What the method asks of the driver."""
        return self.choice.pruner.settings

    @property
    def refits(self) -> bool:
        """Whether the layers that lost inputs are fitted to what they gave."""
        return self.choice.samples is not None if self.settings.refit is None else self.settings.refit

    @property
    def recalibrates(self) -> bool:
        """Whether the statistics of batch norms are estimated anew."""
        given = self.settings.recalibrate_norms
        return self.choice.samples is not None if given is None else given

    def decided(self, progress: Progress) -> ChannelPlan:
        """The plan with the channels that stay, where the run is left to choose them: no byte count changes."""
        if self.choice.decided_by_plan or not self.kept:
            return self
        units = self.choice.chosen([len(units) for _, units in self.groups], progress)
        groups = tuple((group, kept) for (group, _), kept in zip(self.groups, units, strict=True))
        return replace(self, groups=groups, kept=kept_places(self.choice.draft.module, groups))

    def rows(self, seconds: Mapping[str, float] | None = None) -> tuple[LayerRow, ...]:
        """A row for each layer of the input."""
        return tuple(self._row(info, (seconds or {}).get(info.tensor, 0.0)) for info in self.infos)

    def _row(self, info: LayerInfo, seconds: float) -> LayerRow:
        planned = self.output.parameters[info.tensor]
        path = self.choice.draft.names[info.tensor].rpartition(".")[0]
        size = self.output.nbytes(info.tensor, info.part)
        form = Dense.form if planned.weight is None else planned.weight.form
        reason = next((one.reason for one in self.fixed if one.name == path), "left as it is")
        if path not in self.kept or info.part:
            return LayerRow(info.name, info.kind, "-", "-", form, {}, info.nbytes, size, 0.0, seconds, reason)
        old = {"out": info.tensor_shape[0], "in": info.tensor_shape[1]}
        new = {"out": planned.dense.shape[0], "in": planned.dense.shape[1]}
        detail = {side: f"{new[side]} of {old[side]}" for side in old if new[side] != old[side]}
        decoded = info.outline is not None and planned.weight is None
        note = "its form cannot hold the cut: decoded" if decoded else ""
        name = self.choice.pruner.method.name
        return LayerRow(info.name, info.kind, "method", name, form, detail, info.nbytes, size, None, seconds, note)

    def summary(self) -> PlanSummary:
        """What a dry run prints."""
        return replace(super().summary(), survey=tuple(self.choice.survey.measured))
