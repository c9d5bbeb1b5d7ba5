"""The units of a checkpoint that stay: chosen while the step is planned, before its run cuts anything, or during it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic

from aicompress.checkpoint import Checkpoint
from aicompress.errors import Refused, raise_all
from aicompress.methods.structural import AnyPruner, Structure
from aicompress.pipeline.calibration import requirements
from aicompress.pipeline.calibration.request import Request
from aicompress.pipeline.step.layer_plan import LayerPlan
from aicompress.pipeline.step.options import Progress
from aicompress.pipeline.step.survey import SurveyResult
from aicompress.pipeline.structured.edit import Edit, with_refits
from aicompress.pipeline.structured.reading import Measurement
from aicompress.pipeline.structured.unit import Kept, L, Scores, StructuralUnit, U
from aicompress.pipeline.structured.unknown_layers import without_unknown
from aicompress.recipe import Recipe


@dataclass(frozen=True)
class UnitChoice(Generic[U, L]):
    """The units of a checkpoint, and how many of each structure stay.

    Attributes:
        checkpoint, recipe, request: of the step.
        pruner: the method with its parameters.
        unit: finds and cuts the units.
        layout: where they lie.
        sizes: how many stay of each structure.
        record: the record of the data that decided on the sizes.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    request: Request
    pruner: AnyPruner
    unit: StructuralUnit[U, L]
    layout: L
    sizes: tuple[int, ...]
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def structures(self) -> tuple[Structure, ...]:
        """What the method chooses in."""
        return self.layout.structures

    @property
    def decided_by_plan(self) -> bool:
        """Whether the plan has to choose: the bytes of the output depend on the choice, or nothing goes."""
        return not self.unit.scored or not self._changed or not self.unit.interchangeable(self.checkpoint, self.layout)

    @property
    def _changed(self) -> bool:
        return any(size < structure.size for structure, size in zip(self.structures, self.sizes, strict=True))

    @property
    def _measured(self) -> bool:
        """Whether the choice is made by scores of the running model."""
        return self.unit.scored and self._changed and bool(self.pruner.reads)

    def require(self) -> None:
        """Whatever the scores need is there, and the model lets itself be watched.

        Raises:
            Refused: or Problems, what is missing.
        """
        if not self._measured:
            return
        if self.request.stats:
            what = f"{self.pruner.method.name} scores {self.pruner.unit.plural}"
            raise Refused(f"{what}, which files of statistics do not hold", "leave --stats out")
        asked = self._measurement()
        method = self.pruner.method
        raise_all(requirements.problems(self, method, asked.layers))
        self.unit.require_scores(self.layout, asked)

    def edit(self) -> Edit:
        """What changes as the plan knows it: until the run chooses, the first units of each structure stand for it."""
        if not self.unit.scored:
            return self._edit({}, self.record)
        if not self.decided_by_plan:
            return self._edit(self._first(), {}, told=False)
        if not self._measured:
            return self._edit(self._kept(self.structures), self.record)
        units, left = sum(structure.size for structure in self.structures), sum(self.sizes)
        what = f"{' and '.join(sorted(self.pruner.reads))} of {units} {self.pruner.unit.plural}, {left} of which stay"
        measured = self.request.survey.recorded(what, self.checkpoint, self.recipe, self._survey)
        importance = [measured.tensors[f"importance.{number}"] for number in range(len(self.structures))]
        return self._scored(Scores(importance, measured.record))

    def run_edit(self, progress: Progress) -> Edit:
        """What changes, with the units that stay, chosen now that the step runs."""
        return self._scored(self._scores(progress)) if self._measured else self._edit(self._kept(self.structures), {})

    def _survey(self, progress: Progress) -> SurveyResult:
        scores = self._scores(progress)
        return SurveyResult({f"importance.{n}": each for n, each in enumerate(scores.importance)}, scores.record)

    def _scores(self, progress: Progress) -> Scores:
        return self.unit.scores(self.layout, self.sizes, self._measurement(), self.pruner.reads, progress)

    def _scored(self, scores: Scores) -> Edit:
        structures = [
            replace(structure, importance=each)
            for structure, each in zip(self.structures, scores.importance, strict=True)
        ]
        return self._edit(self._kept(structures), scores.record)

    def _kept(self, structures: Sequence[Structure]) -> Kept:
        return {
            number: tuple(range(size) if size == structure.size else self.pruner.keep(structure, size))
            for number, (structure, size) in enumerate(zip(structures, self.sizes, strict=True))
        }

    def _first(self) -> Kept:
        """As many units of every structure as will stay: the first ones of each of its groups."""
        return {
            number: tuple(
                group * (structure.size // structure.groups) + place
                for group in range(structure.groups)
                for place in range(size // structure.groups)
            )
            for number, (structure, size) in enumerate(zip(self.structures, self.sizes, strict=True))
        }

    def _edit(self, kept: Kept, record: Mapping[str, Any], told: bool = True) -> Edit:
        """The edit of the units that stay; without a word on which they are where that is still open."""
        edit = self.unit.edit(self.layout, self.sizes, kept)
        edit = without_unknown(edit if told else replace(edit, warnings=(), notes=()), self.layout.architecture.names)
        changes = with_refits(edit.changes, edit.structures, edit.sizes, self.pruner.refits)
        return replace(edit, changes=changes, calibration=record)

    def _measurement(self) -> Measurement:
        infos = self.unit.scored_layers(self.checkpoint, self.layout)
        layers = [LayerPlan(info, self.pruner.config) for info in infos]
        return Measurement(self.checkpoint, self.recipe, self.request, layers)
