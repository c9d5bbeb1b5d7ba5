"""A structural unit as the pipeline handles it: found in a checkpoint, scored on the model, cut with config.json.

One file in `units/` for each kind; see `registry`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.layer import LayerInfo
from aicompress.methods.structural import Structure, Unit
from aicompress.model.architecture.architecture import Architecture
from aicompress.pipeline.step.options import Progress
from aicompress.pipeline.step.workers import Processes
from aicompress.pipeline.structured import calibrated
from aicompress.pipeline.structured.cutting import Cutting
from aicompress.pipeline.structured.edit import Edit
from aicompress.pipeline.structured.reading import Measurement, Reading, layers_of

Kept = Mapping[int, tuple[int, ...]]  # the units that stay, by the structure's place


@dataclass(frozen=True)
class UnitLayout:
    """Where the units of a checkpoint lie; each kind of unit adds what its edit needs.

    Attributes:
        structures: what a method chooses in.
        architecture: of the checkpoint.
    """

    structures: tuple[Structure, ...]
    architecture: Architecture


@dataclass(frozen=True)
class Scores:
    """Importance of units, measured on the running model before any of them goes.

    Attributes:
        importance: (units,) of each structure.
        record: where the calibration samples came from, for the report.
    """

    importance: Sequence[Tensor]
    record: Mapping[str, Any]


U = TypeVar("U", bound=Unit)
L = TypeVar("L", bound=UnitLayout)


class StructuralUnit(ABC, Generic[U, L]):
    """What the pipeline does with one kind of unit.

    Every kind is found and edited. Where `scored` is False, units are rows and columns of matrices that stay: they are
    chosen while the run reads statistics of what reads them. Where it is True, they are whole units with numbers in
    their names: they are scored as wholes before anything is cut.

    Attributes:
        kind: the class by which methods name these units.
        scored: they are scored before any of them goes.
        silenceable: a model without some of them computes as the whole model with these silent.
    """

    kind: type[U]
    scored: bool = False
    silenceable: bool = True

    @abstractmethod
    def find(self, checkpoint: Checkpoint, unit: U, stack: str | None) -> L:
        """Where the units lie.

        Args:
            checkpoint: the input.
            unit: how the method takes them.
            stack: prefix of the stack of blocks to act on, or None.

        Raises:
            Refused: there are none, or config.json and the checkpoint do not belong together.
        """

    def read(self, layout: L, asked: Measurement) -> tuple[L, Mapping[str, Any]]:
        """Read what sizes are decided by beside headers and without a run of the model, such as a text's tokens.

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
        """What changes when so many units of each structure stay.

        Args:
            layout: where they lie.
            sizes: how many stay of each structure.
            kept: which of them, for scored units; empty for others, whose shapes do not depend on it.

        Raises:
            Refused: config.json cannot express it.
        """

    def accepted(self, layout: L, sizes: Sequence[int]) -> list[int]:
        """The sizes, or larger ones where the architecture does not take these.

        Raises:
            RecipeError: it takes none, or not the very ones that were asked for.
        """
        return list(sizes)

    def interchangeable(self, checkpoint: Checkpoint, layout: L) -> bool:
        """Whether names, shapes and config.json of the output are the same whichever units stay."""
        return True

    def needs(self, reads: frozenset[str]) -> frozenset[str]:
        """The statistics that a run collects while it chooses, of those that a method reads; none for scored units."""
        return frozenset() if self.scored else reads

    def require_statistics(self, layout: L, reads: frozenset[str]) -> None:
        """Check that the statistics that a method reads can choose among the units.

        Raises:
            Refused: they cannot.
        """

    def silent(
        self, model: Any, layout: L, kept: Mapping[int, Tensor], inputs: Mapping[str, Tensor]
    ) -> AbstractContextManager[object]:
        """Let a running model compute as if the units that go were not there, where zeros in consumers do not.

        Args:
            model: of the whole checkpoint, small.
            layout: where its units lie.
            kept: the units that stay, by the structure's place.
            inputs: what it is run on.

        Raises:
            CheckpointError: what has to be silent cannot be told in the model.
        """
        return nullcontext()

    def scored_layers(self, checkpoint: Checkpoint, layout: L) -> list[LayerInfo]:
        """The layers that units which are scored consist of; another layer where none of theirs is a matrix."""
        tensors = [part.tensor for structure in layout.structures for part in structure.parts]
        return layers_of(checkpoint, tensors) or checkpoint.layers(None)[:1]

    def require_scores(self, layout: L, measurement: Measurement) -> None:
        """Check, without data, that units which are scored can be watched in the running model.

        Raises:
            Refused: they cannot.
        """

    def scores(
        self, layout: L, sizes: Sequence[int], measurement: Measurement, reads: frozenset[str], progress: Progress
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

    def choose(
        self, reading: Reading, work: Cutting, team: Processes, inputs: Future[dict[str, str]]
    ) -> dict[str, Any]:
        """Choose what stays of every structure by statistics, in the process that writes.

        Returns:
            The record of the calibration data.
        """
        return calibrated.choose(reading, work, team, inputs)

    def follow(self, reading: Reading, team: Processes) -> None:
        """What the other processes do meanwhile: their share of the batches."""
        calibrated.follow(reading, team)


AnyUnit: TypeAlias = StructuralUnit[Any, Any]  # found by its kind: the classes it works with are known to it alone
