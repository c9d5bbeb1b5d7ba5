"""What structural steps read of the running model, as calibration is asked for it, and what gradients say of units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.errors import RecipeError
from aicompress.layer import LayerInfo, from_matrix
from aicompress.methods.structural import Part, Structure
from aicompress.pipeline.calibration.gradients import GradientReader
from aicompress.pipeline.calibration.request import Step
from aicompress.pipeline.step.checks import known_kinds
from aicompress.pipeline.step.output import Output
from aicompress.pipeline.structured.edit import Edit
from aicompress.statistics import GradientStats


@dataclass(frozen=True)
class Reading(Step):
    """The statistics by which a run chooses the units that stay, and refits what reads them.

    Attributes:
        output: of the step; gradients lie beside it while they are needed.
        edit: the structures, and how many of their units stay.
        needs: statistics of the consumers' inputs, and "gradients".
        compares: the original model's inputs are compared with the compressed one's.
    """

    output: Output
    edit: Edit
    needs: frozenset[str]
    compares: bool

    @property
    def tensors(self) -> list[str]:
        """Parameters of which a file of statistics must tell: gradients of all that changes, else consumers' inputs."""
        if "gradients" in self.needs:
            return list(dict.fromkeys(layer.info.tensor for layer in self.layers))
        return self.edit.consumers


def layers_of(checkpoint: Checkpoint, tensors: Sequence[str]) -> list[LayerInfo]:
    """The layers that some parameters belong to, in the input's order."""
    wanted = set(tensors)
    infos = checkpoint.layers(known_kinds(checkpoint)[0])
    return [info for info in infos if info.tensor in wanted and info.kind != "experts"]


def importance(structure: Structure, infos: Mapping[str, LayerInfo], read: GradientReader) -> tuple[Tensor, bool]:
    """Importance of each unit, (units,) float64, and whether any gradient reached them; by w² where none did.

    Args:
        structure: its parts can take rows of any tensor of their shape.
        infos: layers by tensor; other tensors add nothing.
        read: gives the moments of a layer's gradient.
    """
    moments = {p.tensor: read(infos[p.tensor].name) for p in structure.parts if p.tensor in infos}
    reached = any(moment is not None for moment in moments.values())
    total = torch.zeros(structure.size, dtype=torch.float64)
    for part in structure.parts:
        if part.tensor in moments and part.take is not None and (not reached or moments[part.tensor] is not None):
            total += _rows(part, infos[part.tensor], moments[part.tensor])
    return total, reached


@dataclass
class Importances:
    """Adds up the importance of the units of several structures as moments come in, none of which is kept.

    Attributes:
        structures: whose units are judged.
        infos: layers by tensor.
        totals: importance of the units by the structure's place; those that no gradient reached are not in it.
    """

    structures: Sequence[Structure]
    infos: Mapping[str, LayerInfo]
    totals: dict[int, Tensor] = field(default_factory=dict)

    def add(self, moments: Mapping[str, GradientStats]) -> None:
        """Take the moments of some layers."""
        for number, structure in enumerate(self.structures):
            for part in structure.parts:
                info = self.infos.get(part.tensor)
                if info is not None and info.name in moments and part.take is not None:
                    zero = torch.zeros(structure.size, dtype=torch.float64)
                    self.totals[number] = self.totals.get(number, zero) + _rows(part, info, moments[info.name])


def _rows(part: Part, info: LayerInfo, moments: GradientStats | None) -> Tensor:
    """What one tensor adds to the importance of each unit, (units,)."""
    square = part.read().double().square()  # (units, numbers)
    if moments is not None:
        assert part.take is not None
        assert moments.square is not None
        square *= part.take(from_matrix(moments.square, info.tensor_shape, info.transposed)).double()
    return square.sum(dim=1)


def factor_problems(infos: Sequence[LayerInfo]) -> list[RecipeError]:
    """A problem where a weight is stored as two factors, whose entries are no unit's own."""
    factors = [info.name for info in infos if info.part]
    if not factors:
        return []
    hint = "prune before it is factorized, or choose by score: obs"
    return [RecipeError(f"score: taylor weighs whole weights, and {factors[0]} is a factor of one", hint)]
