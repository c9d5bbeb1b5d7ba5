"""What moves of a student: which of its tensors a recipe's mode trains, found from headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CompressError, RecipeError, Refused
from aicompress.methods.modes import NOTHING, Mode, ModeConfig, StudentParameter, get_mode
from aicompress.recipe.distillation import Training
from aicompress.weights import Submatrix, Weight
from aicompress.weights.form import within
from aicompress.weights.stored.masked import Masked


@dataclass(frozen=True)
class StudentMode:
    """A mode with what it moves of one student.

    Attributes:
        mode: of the recipe.
        config: its parameters.
        suffixes: by parameter of the checkpoint the suffixes of the tensors that move, '' of a plain one.
        parameters: of the student.
    """

    mode: Mode[ModeConfig]
    config: ModeConfig
    suffixes: Mapping[str, frozenset[str]]
    parameters: tuple[StudentParameter, ...]

    @classmethod
    def of(cls, student: Checkpoint, config: ModeConfig) -> StudentMode:
        """What a mode moves of a student."""
        mode, owners = get_mode(config.name), student.manifest.owners
        shared = {each for name in student.parameters() for each in (name, *owners(name).values()) if owners(name)}
        parameters = tuple(
            StudentParameter(
                name, spec.shape, student.outline(name), partial(_has_zeros, student, name), name in shared
            )
            for name, spec in student.parameters().items()
        )
        return cls(mode, config, {each.name: mode.moves(each, config) for each in parameters}, parameters)

    def problems(self, training: Training, teachers: Sequence[Checkpoint], student: Checkpoint) -> list[CompressError]:
        """Errors that say why the mode can do nothing for a student, or nothing with its teachers."""
        if self.mode.keeps_zeros and training.keep_zeros is False:
            hint = "leave keep_zeros out, or take mode: full"
            return [RecipeError(f"mode {self.mode.name} keeps zeros, training.keep_zeros: false does not", hint)]
        if training.shard and (self.config.layer_by_layer or self.mode.recodes is not None):
            what = f"mode {self.mode.name} takes no steps with all of a large student: there is nothing to shard"
            return [RecipeError(what, "leave training.shard out")]
        if self.config.layer_by_layer and (different := self._different(teachers, student)):
            hint = "give the checkpoint that the student was compressed from, or take mode: full"
            return [Refused(f"mode {self.mode.name} compares layers of one name: {different}", hint)]
        problem = self.mode.check(self.parameters, self.config)
        return [] if problem is None else [RecipeError(f"mode {self.mode.name}: {problem[0]}", problem[1])]

    def _different(self, teachers: Sequence[Checkpoint], student: Checkpoint) -> str:
        """Why a student cannot be compared with its teacher layer by layer, in words; empty where it can."""
        if len(teachers) != 1 or teachers[0] is student:
            return "it takes one teacher, that runs"
        theirs = teachers[0].parameters()
        for each in self.parameters:
            if each.name not in theirs:
                return f"the teacher has no {each.name}"
            if each.is_vector and theirs[each.name].shape != each.shape:
                return f"{each.name} has {list(each.shape)} numbers, the teacher's {list(theirs[each.name].shape)}"
        return ""

    @property
    def told(self) -> tuple[str, ...]:
        """How many parameters stay, in words; nothing where all move."""
        layers = [each for each in self.parameters if not each.is_vector]
        moved = sum(bool(self.suffixes[each.name]) for each in layers)
        if moved == len(layers):
            return ()
        vectors = sum(bool(self.suffixes[each.name]) for each in self.parameters if each.is_vector)
        beside = f", and {vectors} norms and biases" if vectors else ""
        return (f"mode {self.mode.name}: {moved} of {len(layers)} weights move{beside}",)

    def relative(self, name: str) -> frozenset[str]:
        """Suffixes of a parameter's tensors whose learning rate is relative to their size."""
        weight = next(each.weight for each in self.parameters if each.name == name)
        return NOTHING if weight is None else self.mode.relative(weight)

    def code_rate(self, steps: int) -> float:
        """How far the first steps of a training move a code, in steps of its grid."""
        return self.mode.rate(self.config, steps)

    def relaxed(self, weight: Weight) -> Weight:
        """A stored weight with latent numbers in the place of codes that move."""
        return weight if self.mode.relax is None else self.mode.relax(weight)

    def stays(self, name: str) -> bool:
        """Whether the mode leaves a parameter as it is."""
        return not self.suffixes[name]


def keeps_zeros(training: Training, student: Checkpoint, mode: Mode[ModeConfig]) -> bool:
    """Whether weights that are zero stay zero: as the mode or the recipe says, or where an earlier step pruned."""
    if mode.keeps_zeros or isinstance(training.keep_zeros, bool):
        return mode.keeps_zeros or training.keep_zeros is True
    return any(step.get("command") == "prune" for step in student.manifest.lineage)


def _has_zeros(student: Checkpoint, name: str) -> bool:
    """Whether a form holds a mask, or a plain matrix has zeros in rows of other elements, which padding has not."""
    outline = student.outline(name)
    if outline is not None:
        return any(isinstance(each, Masked | Submatrix) for each in within(outline))
    zero = student.read(name).flatten(1) == 0
    return bool((zero.any(dim=1) & ~zero.all(dim=1)).any())
