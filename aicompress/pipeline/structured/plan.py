"""The plan of a structural step: tensors that are cut, dropped and renamed, config.json, every byte of the output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from aicompress.checkpoint import Checkpoint
from aicompress.layer import LayerInfo
from aicompress.pipeline.step.layer_plan import LayerPlan
from aicompress.pipeline.step.options import Progress
from aicompress.pipeline.step.output import Destination, Output, arrange
from aicompress.pipeline.step.plan import StepPlan
from aicompress.pipeline.structured.axes import planned
from aicompress.pipeline.structured.choice import UnitChoice
from aicompress.pipeline.structured.edit import Edit, ParameterChange
from aicompress.pipeline.structured.reading import Reading
from aicompress.recipe import Recipe
from aicompress.report.model import LayerRow
from aicompress.report.plan import PlanSummary
from aicompress.weights import Dense


@dataclass(frozen=True)
class StructurePlan(StepPlan):
    """A structural step that can be run, or printed.

    Attributes:
        choice: the units, and how many of each structure stay by the method with explicit parameters.
        edit: what changes.
        notes: what the user asked for, and the plan has settled.
    """

    recipe: Recipe
    choice: UnitChoice[Any, Any]
    edit: Edit
    notes: tuple[str, ...] = ()

    @property
    def told(self) -> tuple[str, ...]:
        """What has been settled: how many units stay, and which."""
        return (*self.notes, *self.edit.notes)

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that the run collects to choose units and to refit what reads them."""
        changed = [self.edit.structures[number] for number in self.edit.changed]
        if not changed:
            return frozenset()
        known = all(structure.importance is not None for structure in changed)  # measured while it was planned
        return self.choice.unit.needs(self.choice.pruner.reads) - ({"gradients"} if known else set())

    @property
    def reading(self) -> Reading:
        """What the run reads of the running model."""
        step = (self.checkpoint, self.recipe, self.choice.request, self.layers)
        return Reading(*step, self.output, self.edit, self.needs, self.choice.pruner.compares)

    @property
    def layers(self) -> tuple[LayerPlan, ...]:
        """Layers that make or read units of which some go."""
        changed = (self.edit.structures[number] for number in self.edit.changed)
        tensors = {part.tensor for structure in changed for part in structure.parts}
        return tuple(
            LayerPlan(info, self.choice.pruner.config)
            for info in self.infos
            if info.tensor in tensors and info.kind != "experts"
        )

    def decided(self, progress: Progress) -> StructurePlan:
        """The plan with the units that stay, where the run is left to choose them; all processes choose together."""
        if self.choice.decided_by_plan:
            return self
        edit = self.choice.run_edit(progress)
        where = (self.output.destination, self.output.manifest.lineage[-1])
        output = laid_out(self.checkpoint, edit, self.infos, *where)
        return replace(self, edit=edit, output=output, warnings=tuple(dict.fromkeys((*self.warnings, *edit.warnings))))

    def rows(self, seconds: Mapping[str, float] | None = None) -> tuple[LayerRow, ...]:
        """A row for each layer of the input, the dropped ones included."""
        made = {change.source: (name, change) for name, change in self.edit.changes.items()}
        took = seconds or {}
        return tuple(self._row(info, made.get(info.tensor), took.get(info.tensor, 0.0)) for info in self.infos)

    def _row(self, info: LayerInfo, made: tuple[str, ParameterChange] | None, seconds: float) -> LayerRow:
        method = self.choice.pruner.method.name
        if made is None:
            return LayerRow(info.name, info.kind, "method", method, "dropped", {}, info.nbytes, 0, None, seconds)
        name, change = made
        size, form = self._stored(name, info)
        if not change.detail and not change.note:
            return LayerRow(info.name, info.kind, "-", "-", form, {}, info.nbytes, size, 0.0, seconds, "left as it is")
        detail = dict(change.detail)
        note = "its form cannot hold the cut: decoded" if self.decoded(name) else change.note
        error = None if change.cuts else 0.0
        return LayerRow(info.name, info.kind, "method", method, form, detail, info.nbytes, size, error, seconds, note)

    def decoded(self, name: str) -> bool:
        """Whether a compressed parameter of the input is a plain tensor of the output."""
        source = self.edit.changes[name].source
        return source in self.checkpoint.manifest.entries and self.output.parameters[name].weight is None

    def _stored(self, name: str, info: LayerInfo) -> tuple[int, str]:
        """Bytes and form of a layer of the input in the output; a decoded factor counts with the other one."""
        parameter = self.output.parameters[name]
        size = self.output.nbytes(name, info.part)
        if parameter.weight is None:
            return size, Dense.form
        if not self.edit.changes[name].cuts:
            return size, info.stored
        return size, (parameter.weight.parts()[info.part] if info.part else parameter.weight).form

    def summary(self) -> PlanSummary:
        """What a dry run prints; which units stay is left open where the run chooses them."""
        summary = super().summary()
        summary = replace(
            summary, survey=tuple(self.choice.request.survey.measured), notes=(*summary.notes, *self.told)
        )
        if self.choice.decided_by_plan:
            return summary
        return self._left_open(summary)

    def _left_open(self, summary: PlanSummary) -> PlanSummary:
        """The summary without a word on which of the units stay that the run has to choose among."""
        numbered = {
            part.tensor
            for number in self.edit.changed
            for part in self.edit.structures[number].of("whole")
            if part.tensor not in self.edit.changes or not self.edit.changes[part.tensor].cuts
        }
        open_names = {info.name for info in self.infos if info.tensor in numbered}
        rows = [row for row in summary.rows if row.name not in open_names]
        unit = self.choice.pruner.unit.plural
        told = [
            f"{structure.name}: the run chooses the {size} of {structure.size} {unit} that stay"
            for structure, size in zip(self.edit.structures, self.edit.sizes, strict=True)
            if size < structure.size
        ]
        unchanged = len(self.infos) - len(rows) - len(open_names)
        return replace(summary, rows=tuple(rows), unchanged=unchanged, notes=(*summary.notes, *told))


def laid_out(
    checkpoint: Checkpoint, edit: Edit, infos: tuple[LayerInfo, ...], destination: Destination, step: dict[str, Any]
) -> Output:
    """The output of an edit.

    Args:
        checkpoint: the input.
        edit: what changes.
        infos: every layer of the input.
        destination: where the output goes.
        step: this step for the lineage.
    """
    by_tensor = {info.tensor: info for info in infos}
    parameters = {name: planned(checkpoint, edit, name, by_tensor) for name in edit.changes}
    output = arrange(checkpoint, destination, parameters, step, edit.config, edit.widths)
    taken = tuple(path for path in checkpoint.source.side_files if path not in edit.left_out)
    return replace(output, files=edit.files, source=replace(output.source, side_files=taken))
