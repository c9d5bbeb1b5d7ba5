"""Processes that walk or tune together, and the sum of the input statistics of each one's batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aicompress.errors import CompressError
from aicompress.model.blocks.input_statistics import InputSums, Recorder, is_largest


class Team:
    """Processes that do the same at the same time; this one alone, unless a subclass knows others.

    Attributes:
        rank: number of this process; 0 writes.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank; values are small Python objects."""
        return [value]


ALONE = Team()


def add_up(recorder: Recorder, team: Team) -> None:
    """Replace a recorder's sums by those over all processes.

    A process may have seen no row for a layer, such as an expert: what the others saw decides what is added.

    Raises:
        CompressError: processes disagree on which layers share an input.
    """
    mine = {
        leader: (sums.count, sums.weight, {name: tuple(tensor.shape) for name, tensor in sums.tensors.items()})
        for leader, sums in recorder.sums.items()
    }
    everyone = team.gather((dict(recorder.leaders), mine))
    for leaders, _ in everyone:
        for name, leader in leaders.items():
            if recorder.leaders.setdefault(name, leader) != leader:
                raise CompressError(f"{name}: processes disagree on the layers that share its input", "run one process")
    for leader in sorted({leader for _, sums in everyone for leader in sums}):
        parts = [sums[leader] for _, sums in everyone if leader in sums]
        shapes = {name: shape for _, _, tensors in parts for name, shape in tensors.items()}
        held = recorder.sums.setdefault(leader, InputSums(recorder.needs))
        held.count = sum(count for count, _, _ in parts)
        held.weight = sum(weight for _, weight, _ in parts)
        for name in sorted(shapes):
            tensor = held.tensors.get(name)
            if is_largest(name):
                seen = [each for each in team.gather(tensor) if each is not None]
                held.tensors[name] = torch.stack(seen).amax(dim=0)
            else:
                held.tensors[name] = team.total(torch.zeros(shapes[name]) if tensor is None else tensor)
