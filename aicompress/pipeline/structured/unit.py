"""A structural unit as the pipeline handles it: found in a checkpoint, scored on the model, cut with config.json.

One file in `units/` for each kind, which `planner` finds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CheckpointError, RecipeError
from aicompress.layer import LayerInfo
from aicompress.methods.structural import Structure, Unit
from aicompress.model.architecture.architecture import Architecture
from aicompress.model.architecture.attention import Attention
from aicompress.model.architecture.config_fields import dotted
from aicompress.model.architecture.experts import Mixture
from aicompress.model.architecture.feed_forward import FeedForward
from aicompress.pipeline.calibration.request import Step
from aicompress.pipeline.step.options import Progress
from aicompress.pipeline.structured.calibrated import BlockChooser, Chooser
from aicompress.pipeline.structured.edit import Edit
from aicompress.pipeline.structured.reading import layers_of
from aicompress.weights import TensorSpec

Kept = Mapping[int, tuple[int, ...]]  # the units that stay, by the structure's place
Scores = tuple[Sequence[Tensor], Mapping[str, Any]]  # importance (units,) of each structure, and the record of the data


@dataclass(frozen=True)
class UnitLayout:
    """Where the units of a checkpoint lie; each kind of unit adds what its edit needs.

    Attributes:
        structures: what a method chooses in.
        architecture: of the checkpoint.
    """

    structures: tuple[Structure, ...]
    architecture: Architecture


U = TypeVar("U", bound=Unit)
L = TypeVar("L", bound=UnitLayout)
Lying = TypeVar("Lying", Attention, FeedForward, Mixture)


class StructuralUnit(ABC, Generic[U, L]):
    """How the pipeline handles one kind of unit: it finds units in a checkpoint, and edits tensors and config.json.

    There are two ways to choose. Units that are rows and columns of matrices, such as neurons, are chosen during the
    run, block by block, by statistics of their consumers' inputs. Units with a number in their tensors' names, such as
    blocks, are scored on the running model before anything is cut; these have `scored`.

    Attributes:
        kind: the class by which methods name these units.
        scored: the units are scored on the running model before anything is cut.
        silenceable: a model without some units computes what the whole model computes with their outputs at zero, so
            that a small model can show whether a cut is right.
        chooser: of units that are chosen during the run.
    """

    kind: type[U]
    scored: bool = False
    silenceable: bool = True
    chooser: type[Chooser] = BlockChooser

    @property
    def name(self) -> str:
        """The kind's own name, by which no two units are found."""
        return f"{self.kind.__module__}.{self.kind.__name__}"

    @abstractmethod
    def find(self, checkpoint: Checkpoint, unit: U, stack: str | None) -> L:
        """Find the units of a checkpoint.

        Args:
            checkpoint: the input.
            unit: how the method takes them.
            stack: prefix of the stack of blocks to act on, or None.

        Raises:
            Refused: there are none, or config.json and the checkpoint do not belong together.
        """

    def read(self, layout: L, asked: Step) -> tuple[L, Mapping[str, Any]]:
        """Read what decides on sizes beside the headers, without a run of the model: such as the tokens of a text.

        Args:
            layout: where the units lie.
            asked: the step; it names no layers.

        Returns:
            The layout with what was read, and the record of the data.

        Raises:
            Refused: the data cannot be read.
        """
        return layout, {}

    @abstractmethod
    def edit(self, layout: L, sizes: Sequence[int], kept: Kept) -> Edit:
        """Lay out the changes to tensors and config.json when so many units of each structure stay.

        Args:
            layout: where the units lie.
            sizes: how many units of each structure stay.
            kept: the units that stay, of scored ones; empty for others, whose shapes do not depend on the choice.

        Raises:
            Refused: config.json cannot express it.
        """

    def accepted(self, layout: L, sizes: Sequence[int]) -> list[int]:
        """The nearest sizes, from these upwards, that the architecture takes.

        Raises:
            RecipeError: it takes none, or not the very ones that were asked for.
        """
        return list(sizes)

    def interchangeable(self, checkpoint: Checkpoint, layout: L) -> bool:
        """Whether the output has the same names, shapes and config.json whichever units stay."""
        return True

    def needs(self, reads: frozenset[str]) -> frozenset[str]:
        """Those of a method's statistics that the run collects while it chooses units; none for scored units."""
        return frozenset() if self.scored else reads

    def require_statistics(self, layout: L, reads: frozenset[str]) -> None:
        """Check that the statistics that a method reads can choose among the units.

        Raises:
            Refused: they cannot.
        """

    def silent(
        self, model: Any, layout: L, kept: Mapping[int, Tensor], inputs: Mapping[str, Tensor]
    ) -> AbstractContextManager[object]:
        """Make a running model compute as if the units that go were absent, where zeros in consumers are not enough.

        Args:
            model: of the whole checkpoint, small.
            layout: where its units lie.
            kept: the units that stay, by the structure's place.
            inputs: what it is run on.

        Raises:
            CheckpointError: it is not known what has to be silent in the model.
        """
        return nullcontext()

    def scored_layers(self, checkpoint: Checkpoint, layout: L) -> list[LayerInfo]:
        """The layers that scored units consist of; the first layer of the model where none of theirs is a matrix."""
        tensors = [part.tensor for structure in layout.structures for part in structure.parts]
        return layers_of(checkpoint, tensors) or checkpoint.layers(None)[:1]

    def require_scores(self, layout: L, measurement: Step) -> None:
        """Check, without data, that units which are scored can be watched in the running model.

        Raises:
            Refused: they cannot.
        """

    def scores(
        self, layout: L, sizes: Sequence[int], measurement: Step, reads: frozenset[str], progress: Progress
    ) -> Scores:
        """Measure the importance of units that are scored.

        Args:
            layout, sizes: where the units lie, and how many stay.
            measurement: of what model, and with what data.
            reads: what the method asks for.
            progress: told of the parts of the measurement.

        Raises:
            Refused: the model does not let them be watched.
        """
        raise TypeError(f"{self.kind.plural} are chosen while the run reads statistics")


AnyUnit: TypeAlias = StructuralUnit[Any, Any]  # found by its kind: the classes it works with are known to it alone


def in_stack(every: Sequence[Lying], stack: str | None, what: str, said: str) -> list[Lying]:
    """Layers of a kind that lie in the stack that is asked for.

    Args:
        every: all of them.
        stack: prefix of the stack, or None.
        what: one of them, in words.
        said: what a field of config.json does to one, in words.

    Raises:
        RecipeError: there are none, or a field of config.json is also that of others.
    """
    chosen = [each for each in every if stack is None or each.name.startswith(f"{stack}.")]
    if not chosen:
        raise RecipeError(
            f"method.stack: no {what} lies in {stack!r}", f"there are {every[0].name} to {every[-1].name}"
        )
    fields = {each.field for each in chosen}
    shared = next((each for each in every if each.field in fields and each not in chosen), None)
    if shared is not None:
        message = f"{dotted(shared.field)} of config.json also {said} {shared.name}"
        raise RecipeError(message, "leave method.stack out")
    return chosen


def require_held(specs: Mapping[str, TensorSpec], tensor: str) -> TensorSpec:
    """A tensor that the checkpoint must hold.

    Raises:
        CheckpointError: it does not.
    """
    if tensor not in specs:
        raise CheckpointError(
            f"the checkpoint lacks {tensor}, which its architecture has",
            "save it again with a current transformers, so that its tensors have their present names",
        )
    return specs[tensor]


def require_axis(specs: Mapping[str, TensorSpec], tensor: str, axis: int, length: int, said: str) -> None:
    """The checkpoint must hold a tensor, as long along an axis as its config.json says.

    Raises:
        CheckpointError: it does not; `said` is what config.json says.
    """
    shape = require_held(specs, tensor).shape
    if len(shape) <= axis or shape[axis] != length:
        raise CheckpointError(
            f"{tensor} has shape {shape}, but {said}", "the checkpoint and its config.json do not belong together"
        )
