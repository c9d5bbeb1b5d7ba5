"""Parameters that a rotation of the residual stream changes: its writers, its readers, and the norms between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from aicompress.model.equivalence.scaling_groups import ChannelAxis

Turn = Callable[[Tensor, int], Tensor]  # (tensor, axis) -> the tensor with R applied along the axis


@dataclass(frozen=True)
class Reader:
    """A normalization of the residual stream and what is given its output.

    Attributes:
        weight: its weight, with the offset that is added to it.
        bias: its bias, or None.
        matrices: the matrices that read it, along their input channels.
    """

    weight: ChannelAxis
    bias: ChannelAxis | None
    matrices: tuple[ChannelAxis, ...]


@dataclass(frozen=True)
class Rotatable:
    """What touches the residual stream, in a block or a model.

    Attributes:
        width: of the stream.
        readers: norms and their readers.
        writers: matrices and biases along their output channels, and embeddings.
        centred: some norm subtracts the mean, so that a turn must keep the vector of ones.
    """

    width: int
    readers: tuple[Reader, ...] = ()
    writers: tuple[ChannelAxis, ...] = ()
    centred: bool = False

    def changes(self, read: Callable[[str], Tensor], turn: Turn) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
        """Every parameter that a turn changes, and how.

        Args:
            read: gives a norm's weight.
            turn: applies R along an axis.
        """
        for reader in self.readers:
            scale = read(reader.weight.parameter).float() + reader.weight.offset
            yield reader.weight.parameter, _constant(1 - reader.weight.offset)
            if reader.bias is not None:
                yield reader.bias.parameter, _divided(scale, turn)
            for axis in reader.matrices:
                yield axis.parameter, _read(axis, scale, turn)
        for axis in self.writers:
            yield axis.parameter, _written(axis, turn)


def _constant(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: torch.full_like(tensor, value)


def _divided(scale: Tensor, turn: Turn) -> Callable[[Tensor], Tensor]:
    """A norm's bias when its weight has moved on: b / w, turned; where w is zero nothing is left to divide."""
    return lambda bias: turn(torch.where(scale == 0, 0.0, bias / scale), 0)


def _read(axis: ChannelAxis, scale: Tensor, turn: Turn) -> Callable[[Tensor], Tensor]:
    return lambda tensor: turn(axis.scaled(tensor, scale), axis.axis)


def _written(axis: ChannelAxis, turn: Turn) -> Callable[[Tensor], Tensor]:
    return lambda tensor: turn(tensor, axis.axis)
