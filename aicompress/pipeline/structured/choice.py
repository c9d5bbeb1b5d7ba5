"""The units of a checkpoint that stay: chosen while the step is planned, before its run cuts anything, or during it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic

from aicompress.errors import Refused, raise_all
from aicompress.methods.structural import AnyPruner, Structure
from aicompress.pipeline.calibration import requirements
from aicompress.pipeline.calibration.request import Step, StepInput
from aicompress.pipeline.step.layer_plan import LayerPlan
from aicompress.pipeline.step.options import Progress
from aicompress.pipeline.step.survey import SurveyResult
from aicompress.pipeline.structured.edit import Edit, with_refits
from aicompress.pipeline.structured.unit import Kept, L, Scores, StructuralUnit, U


@dataclass(frozen=True)
class UnitChoice(StepInput, Generic[U, L]):
    """The units of a checkpoint, and how many of each structure stay.

    Attributes:
        checkpoint, recipe, request: of the step.
        pruner: the method with its parameters.
        unit: finds and cuts the units.
        layout: where they lie.
        sizes: how many stay of each structure.
        record: the record of the data that decided on the sizes.
    """

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
        return self._scored((importance, measured.record))

    def run_edit(self, progress: Progress) -> Edit:
        """What changes, with the units that stay, chosen now that the step runs."""
        return self._scored(self._scores(progress)) if self._measured else self._edit(self._kept(self.structures), {})

    def _survey(self, progress: Progress) -> SurveyResult:
        importance, record = self._scores(progress)
        return SurveyResult({f"importance.{n}": each for n, each in enumerate(importance)}, record)

    def _scores(self, progress: Progress) -> Scores:
        return self.unit.scores(self.layout, self.sizes, self._measurement(), self.pruner.reads, progress)

    def _scored(self, scores: Scores) -> Edit:
        structures = [
            replace(structure, importance=each) for structure, each in zip(self.structures, scores[0], strict=True)
        ]
        return self._edit(self._kept(structures), scores[1])

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

    def _measurement(self) -> Step:
        infos = self.unit.scored_layers(self.checkpoint, self.layout)
        layers = [LayerPlan(info, self.pruner.config) for info in infos]
        return Step(self.checkpoint, self.recipe, self.request, layers)


# Counts in config.json of layers that transformers does not know, such as those that predict several tokens ahead.
_COUNTS = {"num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "num_mtp_modules", "mtp_num_layers"}
_BLOCK = re.compile(r"^.*?\.\d+\.")


def without_unknown(edit: Edit, known: Collection[str]) -> Edit:
    """The edit without layers that the architecture does not know and that hold what is cut elsewhere.

    Args:
        edit: what changes.
        known: names of every tensor that the architecture has.
    """
    if not any(change.cuts for change in edit.changes.values()):
        return edit
    cut = {part.tensor for number in edit.changed for part in edit.structures[number].parts}
    cut = {name for name in cut if name in known and (name not in edit.changes or edit.changes[name].cuts)}
    kinds = {_BLOCK.sub("", name) for name in cut}
    unknown = {change.source for change in edit.changes.values()} - set(known)
    alike = [name for name in unknown if _BLOCK.match(name) and _BLOCK.sub("", name) in kinds]
    if not alike:
        return edit
    parts = _parents(known)
    prefixes = sorted({_unknown_part(name, parts) for name in alike})
    gone = {name for name in unknown if any(name.startswith(f"{prefix}.") for prefix in prefixes)}
    changes = {name: change for name, change in edit.changes.items() if change.source not in gone}
    config, counts = _without_counts(edit.config or {})
    told = f"{', '.join(prefixes)}: {len(gone)} tensors that the architecture does not know are left out, for they "
    told += "cannot be cut alike" + (f"; {', '.join(counts)} becomes 0" if counts else "")
    return replace(edit, changes=changes, config=config, warnings=(*edit.warnings, told))


def _parents(names: Collection[str]) -> set[str]:
    """Every module that any of these parameters lies in."""
    pieces = [name.split(".") for name in names]
    return {".".join(piece[:length]) for piece in pieces for length in range(1, len(piece))}


def _unknown_part(name: str, known: Collection[str]) -> str:
    """The outermost module of a parameter that the architecture does not have."""
    pieces = name.split(".")
    prefixes = [".".join(pieces[:length]) for length in range(1, len(pieces) + 1)]
    return next(prefix for prefix in prefixes if prefix not in known)


def _without_counts(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """config.json that counts no such layers, and the fields that did."""
    counts = [key for key, value in config.items() if key in _COUNTS and value]
    edited = {**config, **dict.fromkeys(counts, 0)}
    for key, value in config.items():
        if isinstance(value, dict):
            edited[key], inner = _without_counts(value)
            counts += inner
    return edited, counts
