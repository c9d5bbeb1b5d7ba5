"""Accumulate first and second moments of per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from aicompress.layer import GradientStats, as_matrix
from aicompress.model.blocks.all_reduce import Team
from aicompress.model.loading.merged_experts import Slot
from aicompress.model.sensitivity.loss import Sample

Part = Callable[[Tensor], Tensor]  # gradient (out, in) of a whole weight -> that of a part of it


@dataclass(frozen=True)
class Watched:
    """A weight whose gradient is wanted.

    Attributes:
        place: its module's path in the model, or its part of a merged parameter.
        shape: the parameter's own shape.
        transposed: it is stored (in, out).
        part: called when its block comes up: how the gradient of a factor follows from that of the weight; None for a
            whole weight.
    """

    place: str | Slot
    shape: tuple[int, ...]
    transposed: bool = False
    part: Callable[[], Part] | None = None

    @property
    def module(self) -> str:
        return self.place.module if isinstance(self.place, Slot) else self.place


class SpreadError(Exception):
    """A sample's gradient in a weight comes in several pieces, which cannot be squared one by one."""


@dataclass
class Sums:
    """Moments of one weight's gradient on their way."""

    watched: Watched
    parameter: nn.Parameter
    part: Part | None
    mean: Tensor | None = None
    square: Tensor | None = None
    seen: set[int] = field(default_factory=set)

    def take(self, sample: Sample) -> None:
        """Add a sample's gradient, if there is one."""
        given = self.parameter.grad
        if given is None:
            return
        if sample.number in self.seen:
            raise SpreadError
        self.seen.add(sample.number)
        place = self.watched.place
        matrix = (
            place.read(given, self.watched.shape)
            if isinstance(place, Slot)
            else as_matrix(given, self.watched.transposed)
        )
        matrix = matrix if self.part is None else self.part(matrix)
        if self.mean is None or self.square is None:
            self.mean, self.square = torch.zeros(matrix.shape), torch.zeros(matrix.shape)
        self.mean.add_(matrix.cpu(), alpha=sample.weight)
        self.square.addcmul_(matrix.cpu(), matrix.cpu(), value=sample.weight)

    def moments(self, count: int, team: Team | None) -> GradientStats:
        """Means over the samples of all processes; a weight that no sample reached has gradient 0."""
        empty = self.parameter.new_zeros(self.watched.shape, device="cpu")
        if self.mean is None or self.square is None:
            matrix = as_matrix(empty, self.watched.transposed and not isinstance(self.watched.place, Slot))
            self.mean = (matrix if self.part is None else self.part(matrix)).clone()
            self.square = self.mean.clone()
        if team is not None:
            self.mean, self.square = team.total(self.mean), team.total(self.square)
        return GradientStats(count, self.mean / count, self.square / count)


def watch(model: Any, wanted: Mapping[str, Watched]) -> dict[str, Sums]:
    """Sums for weights that are in memory, which from now on get gradients."""
    sums: dict[str, Sums] = {}
    for name, watched in wanted.items():
        leaf = watched.place.leaf if isinstance(watched.place, Slot) else "weight"
        parameter = model.get_submodule(watched.module)._parameters[leaf]
        parameter.requires_grad_(True)
        sums[name] = Sums(watched, parameter, watched.part() if watched.part is not None else None)
    return sums


def harvest(sums: Mapping[str, Sums], sample: Sample) -> None:
    """Take a sample's gradients and clear them."""
    for each in sums.values():
        each.take(sample)
    for each in sums.values():
        each.parameter.grad = None
