"""Scaling groups: hidden tensors of a block whose channels can be rescaled without changing its output.

The input of some matrices is divided by factors s, their columns are multiplied by s, and whatever makes this input has
1/s folded into its own parameters: a normalization into its weight, a linear layer into its rows where nothing but
products with other numbers lies between (the values of an attention, the ungated half of a feed-forward layer). Nothing
here knows an architecture: candidates are found by watching the block run on random weights, and a group is one only if
the block's output stays the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aicompress.model.equivalence.trace import Call, Seen, alike, changed, watched

TOLERANCE = 1e-4  # of the largest output: what float32 may lose in a block


@dataclass(frozen=True)
class ChannelAxis:
    """The axis of a parameter along which channels lie.

    Attributes:
        parameter: its name.
        axis: which one.
        offset: added before scaling and taken off after: 1 where a normalization multiplies by 1 + weight.
    """

    parameter: str
    axis: int
    offset: float = 0.0

    def scaled(self, tensor: Tensor, factors: Tensor) -> Tensor:
        """The parameter with each channel multiplied by its factor."""
        shape = [-1 if axis == self.axis else 1 for axis in range(tensor.ndim)]
        return (tensor + self.offset) * factors.to(tensor.dtype).view(shape) - self.offset


@dataclass(frozen=True)
class ScalingGroup:
    """One rescalable input.

    Attributes:
        consumers: the matrices that are given this input, along their input channels.
        producers: the parameters that make it, along their output channels: a weight first, maybe its bias.
        channels: for each input channel of the consumers the channel of the producers that makes it, (in,); several
            channels may be made by one, as in grouped-query attention.
        norm: the producer is a normalization.
    """

    consumers: tuple[ChannelAxis, ...]
    producers: tuple[ChannelAxis, ...]
    channels: Tensor
    norm: bool

    def pooled(self, factors: Tensor) -> Tensor:
        """Factors (in,) > 0 with those of channels that have one origin made equal: their geometric mean."""
        sums = torch.zeros(int(self.channels.max()) + 1, dtype=factors.dtype)
        counts = sums.index_add(0, self.channels, torch.ones_like(factors))
        return (sums.index_add(0, self.channels, factors.log()) / counts.clamp_min(1))[self.channels].exp()

    def inverse(self, factors: Tensor, size: int) -> Tensor:
        """What the producers' channels (size,) are multiplied by: 1/s, and 1 for channels that end elsewhere."""
        divisors = torch.ones(size, dtype=factors.dtype)
        divisors[self.channels] = factors.reciprocal()
        return divisors


@dataclass
class BlockGroups:
    """What the search saw in a block.

    Attributes:
        groups: rescalable inputs.
        left: for each other input the matrices that are given it.
    """

    groups: list[ScalingGroup] = field(default_factory=list)
    left: list[tuple[str, ...]] = field(default_factory=list)


def find_scaling_groups(block: nn.Module, run: Callable[[], Any]) -> BlockGroups:
    """Search a block.

    Args:
        block: in evaluation mode, with float32 random weights; they are changed on the way and restored.
        run: calls it on fixed inputs.
    """
    search = Search(block, run)
    outcome = BlockGroups()
    rest = list(range(len(search.first.calls)))
    for name, output in search.first.norms.items():
        mine = [n for n in rest if reads(search.first.calls[n].given, output)]
        if mine:
            rest = [n for n in rest if n not in mine]
            _note(outcome, search.norm(name, [search.first.calls[n] for n in mine]), search, mine)
    while rest:
        mine = [n for n in rest if _same(search.first.calls[n].given, search.first.calls[rest[0]].given)]
        rest = [n for n in rest if n not in mine]
        _note(outcome, search.linear(mine), search, mine)
    return outcome


def _note(outcome: BlockGroups, group: ScalingGroup | None, search: Search, calls: Sequence[int]) -> None:
    if group is not None:
        outcome.groups.append(group)
        return
    left = tuple(dict.fromkeys(search.first.calls[n].parameter for n in calls))
    if left not in outcome.left:  # the experts of one merged parameter are one
        outcome.left.append(left)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def reads(given: Tensor, output: Tensor) -> bool:
    """Whether every row of an input is a row of an output: all of them, or those that a router sends there."""
    if given.shape[-1] != output.shape[-1]:
        return False
    return bool((given[:, None] == output[None]).all(-1).any(1).all())


@dataclass
class Search:
    """Trials on one block."""

    block: nn.Module
    run: Callable[[], Any]
    first: Seen = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = dict(self.block.named_parameters())
        self.generator = torch.Generator().manual_seed(0)
        self.first = watched(self.block, self.run)

    def norm(self, name: str, readers: Sequence[Call]) -> ScalingGroup | None:
        """A group behind a normalization."""
        prefix = f"{name}." if name else ""
        size = len(self.parameters[f"{prefix}weight"])
        consumers = tuple({call_axis(self.parameters, call): None for call in readers})
        bias = (ChannelAxis(f"{prefix}bias", 0),) if f"{prefix}bias" in self.parameters else ()
        for offset in (0.0, 1.0):
            producers = (ChannelAxis(f"{prefix}weight", 0, offset), *bias)
            group = ScalingGroup(consumers, producers, torch.arange(size), norm=True)
            if self._holds(group):
                return group
        return None

    def linear(self, readers: Sequence[int]) -> ScalingGroup | None:
        """A group behind a linear layer that ran before."""
        calls = self.first.calls
        consumers = tuple({call_axis(self.parameters, calls[n]): None for n in readers})
        if any(self.parameters[axis.parameter].ndim > 2 for axis in consumers):
            return None  # experts: each would need factors of its own
        width = calls[readers[0]].given.shape[-1]
        for call in reversed(calls[: readers[0]]):
            weight = self.parameters[call.parameter]
            size = weight.shape[1 if call.transposed else 0]
            if weight.ndim != 2 or (width % size and size < width):
                continue
            axes = (
                ChannelAxis(call.parameter, 1 if call.transposed else 0),
                *((ChannelAxis(call.bias, 0),) if call.bias else ()),
            )
            for rows in self._parts(axes, size, width, readers[0]):
                channels = self._traced(axes, size, rows, readers[0])
                if channels is not None:
                    group = ScalingGroup(consumers, axes, channels, norm=False)
                    if self._holds(group):
                        return group
        return None

    def _parts(self, axes: Sequence[ChannelAxis], size: int, width: int, reader: int) -> Iterator[Tensor]:
        """Rows of a layer that may make an input: all, or those of a fused one that do.

        In a fused query, key and value the value rows are told by the first token, which attends to itself alone: there
        the other two have no say.
        """
        if size <= width:
            yield torch.arange(size)
            return
        factors = _steps(size, self.generator)
        after = self._scaled(axes, factors, reader)
        ratio = None if after is None else _ratio(self.first.calls[reader].given[:1], after[:1])
        if ratio is not None:
            yield torch.unique(_nearest(ratio, factors))
        if size % width == 0:
            for start in reversed(range(0, size, width)):
                yield torch.arange(start, start + width)

    def _traced(self, axes: Sequence[ChannelAxis], size: int, rows: Tensor, reader: int) -> Tensor | None:
        """The row that makes each channel of an input, if every channel is a multiple of one; else None.

        Each row is scaled by a factor of its own; the channel that it makes shows the same factor at every token.
        """
        factors = torch.ones(size)
        factors[rows] = _steps(len(rows), self.generator)
        before, after = self.first.calls[reader].given, self._scaled(axes, factors, reader)
        ratio = None if after is None else _ratio(before, after)
        if ratio is None or after is None:
            return None
        channels = rows[_nearest(ratio, factors[rows])]
        close = (after - before * factors[channels]).abs().amax(0) <= TOLERANCE * before.abs().amax(0)
        return channels if bool(close.all()) else None

    def _scaled(self, axes: Sequence[ChannelAxis], factors: Tensor, reader: int) -> Tensor | None:
        """A call's input in a run with a layer's rows scaled; None where that run takes another way to it."""
        with self._changed([(axis, factors) for axis in axes]):
            seen = watched(self.block, self.run)
        mine, first = seen.calls[: reader + 1], self.first.calls[: reader + 1]
        same = [(c.parameter, c.given.shape) for c in mine] == [(c.parameter, c.given.shape) for c in first]
        return mine[reader].given if same else None

    def _holds(self, group: ScalingGroup) -> bool:
        """Whether the block's output stays when a group is rescaled."""
        width = len(group.channels)
        factors = group.pooled(torch.exp(torch.rand(width, generator=self.generator) * 2 * math.log(2) - math.log(2)))
        size = self.parameters[group.producers[0].parameter].shape[group.producers[0].axis]
        changes = [(axis, group.inverse(factors, size)) for axis in group.producers]
        with self._changed([*changes, *((axis, factors) for axis in group.consumers)]):
            output = watched(self.block, self.run).output
        return alike(output, self.first.output, TOLERANCE)

    def _changed(self, changes: Sequence[tuple[ChannelAxis, Tensor]]) -> AbstractContextManager[None]:
        """Parameters scaled for a while."""
        scaled = [(axis.parameter, partial(axis.scaled, factors=factors)) for axis, factors in changes]
        return changed(self.parameters, scaled)


def call_axis(parameters: Mapping[str, Tensor], call: Call) -> ChannelAxis:
    """A matrix along its input channels."""
    return ChannelAxis(call.parameter, parameters[call.parameter].ndim - (2 if call.transposed else 1))


def _steps(count: int, generator: torch.Generator) -> Tensor:
    """Different factors between 1/2 and 2, in random order."""
    return torch.linspace(-math.log(2), math.log(2), count).exp()[torch.randperm(count, generator=generator)]


def _ratio(before: Tensor, after: Tensor) -> Tensor | None:
    """What each channel (rows, in) was multiplied by, where it is largest; None where one is zero throughout."""
    where = before.abs().argmax(0, keepdim=True)
    base = before.gather(0, where)[0]
    return None if bool((base == 0).any()) else after.gather(0, where)[0] / base


def _nearest(ratio: Tensor, factors: Tensor) -> Tensor:
    """Index of the factor that is nearest to each ratio."""
    ascending, order = factors.sort()
    right = torch.searchsorted(ascending, ratio).clamp(1, max(1, len(ascending) - 1))
    left = right - 1
    right = right.clamp_max(len(ascending) - 1)
    nearer = (ratio - ascending[left]).abs() <= (ascending[right] - ratio).abs()
    return order[torch.where(nearer, left, right)]
