"""Search a model for scaling groups by running its blocks on random weights: one block of each kind, one in memory.

What holds for random weights on random inputs holds for all: the functions are polynomials and smooth ones, and two of
them that agree on generic numbers are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from aicompress.model.blocks import walk
from aicompress.model.blocks.find import Block, find_blocks
from aicompress.model.blocks.paused_forward import gated
from aicompress.model.equivalence.scaling_groups import BlockGroups, ChannelAxis, ScalingGroup, find_scaling_groups
from aicompress.model.loading.partial_model import PartialModel
from aicompress.model.loading.places import Slot

T = TypeVar("T")


@dataclass(frozen=True)
class ScalingGroups:
    """Rescalable inputs of a model, by names in its checkpoint.

    Attributes:
        groups: in running order of the blocks.
        left: for every other input of a block the matrices that are given it.
    """

    groups: tuple[ScalingGroup, ...] = ()
    left: tuple[tuple[str, ...], ...] = ()


def probe(model: Any, loader: PartialModel, batch: Mapping[str, Tensor]) -> ScalingGroups:
    """Search every block of a model.

    Args:
        model: on the meta device.
        loader: fills parts of it with float32 noise.
        batch: a few samples, as keyword arguments of its forward.

    Raises:
        Exception: whatever the model raises for such a batch.
    """
    found = each_kind(model, loader, batch, find_scaling_groups)
    return _named(found, loader)


@dataclass(frozen=True)
class Searched(Generic[T]):
    """What one block of each kind showed.

    Attributes:
        blocks: of the model, in running order.
        kinds: theirs.
        by_kind: what a search gave; a kind that no batch reaches is missing.
    """

    blocks: Sequence[Block]
    kinds: Sequence[Any]
    by_kind: Mapping[Any, T]

    def named(self) -> Iterator[tuple[str, T]]:
        """Blocks as prefixes of their parameters' names, with what one like them showed."""
        for block, kind in zip(self.blocks, self.kinds, strict=True):
            if kind in self.by_kind:
                yield (f"{block.name}." if block.name else ""), self.by_kind[kind]


def each_kind(
    model: Any,
    loader: PartialModel,
    batch: Mapping[str, Tensor],
    search: Callable[[nn.Module, Callable[[], Any]], T],
) -> Searched[T]:
    """Run a model on noise and search one block of each kind.

    Args:
        model: on the meta device.
        loader: fills parts of it with float32 noise.
        batch: a few samples, as keyword arguments of its forward.
        search: (a block, a function that runs it) -> what it shows; parameters that it changes it restores.

    Raises:
        Exception: whatever the model raises for such a batch.
    """
    blocks = find_blocks(model)
    prepare(model)
    kinds = [kind_of(block.module) for block in blocks]
    loader.load(lambda name: not any(block.owns(name) for block in blocks))
    by_kind: dict[Any, T] = {}
    outputs: dict[Any, Any] = {}
    try:
        with gated([block.module for block in blocks], [partial(model, **batch)]) as (stream,):
            stream.start()
            while (arrival := stream.arrival) is not None and len(by_kind) < len(set(kinds)):
                block, kind = blocks[arrival.block], kinds[arrival.block]
                if kind not in by_kind:
                    by_kind[kind], outputs[kind] = _searched(block, loader, arrival, search)
                stream.advance(outputs[kind])  # of a block like it: only the shape counts
    finally:
        loader.drop(lambda name: True)
    return Searched(blocks, kinds, by_kind)


def prepare(model: Any) -> None:
    """Let a model run without a cache, its experts one after another so that they can be watched, on short tables."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # it may lie beyond the rows that there are
    walk.prepare(model)


def kind_of(block: nn.Module) -> Any:
    """What blocks of the same structure have in common."""
    modules = tuple((name, type(module).__name__) for name, module in block.named_modules())
    return modules, tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())


def _searched(
    block: Block, loader: PartialModel, arrival: Any, search: Callable[[nn.Module, Callable[[], Any]], T]
) -> tuple[T, Any]:
    loader.load(block.owns)

    def run() -> Any:
        return block.module(*arrival.args, **arrival.kwargs)

    with torch.no_grad():
        outcome, output = search(block.module, run), run()
    loader.drop(block.owns)
    return outcome, output


def _named(found: Searched[BlockGroups], loader: PartialModel) -> ScalingGroups:
    """The finds of one block of each kind as those of all blocks, by names in the checkpoint."""
    sources = sources_of(loader)
    groups: list[ScalingGroup] = []
    left: list[tuple[str, ...]] = []
    for prefix, block in found.named():
        for group in block.groups:
            consumers = in_checkpoint(group.consumers, prefix, sources, loader)
            producers = in_checkpoint(group.producers, prefix, sources, loader)
            if consumers is None or producers is None:
                left.append(
                    tuple(name for axis in group.consumers for name in sources.get(prefix + axis.parameter, ()))
                )
            else:
                groups.append(replace(group, consumers=consumers, producers=producers))
        left += [tuple(n for p in parameters for n in sources.get(prefix + p, ())) for parameters in block.left]
    return ScalingGroups(tuple(groups), tuple(filter(None, left)))


def sources_of(loader: PartialModel) -> dict[str, list[str]]:
    """Parameters of the checkpoint by the model's."""
    sources: dict[str, list[str]] = {}
    for name, (target, _) in loader.targets.items():
        sources.setdefault(target, []).append(name)
    return sources


def in_checkpoint(
    axes: Sequence[ChannelAxis], prefix: str, sources: Mapping[str, Sequence[str]], loader: PartialModel
) -> tuple[ChannelAxis, ...] | None:
    """Axes of the checkpoint's parameters; None where one has no counterpart, such as experts kept merged."""
    named: list[ChannelAxis] = []
    for axis in axes:
        names = sources.get(prefix + axis.parameter, ())
        for name in names:
            if loader.targets[name][1] is None:
                named.append(replace(axis, parameter=name))
                continue
            place = loader.place_of(name)
            if not isinstance(place, Slot):
                return None
            # Experts (experts, out, in) are matrices (out, in) in the checkpoint, or lie transposed there.
            named.append(replace(axis, parameter=name, axis=(axis.axis - 1) ^ place.transposed))
        if not names:
            return None
    return tuple(named)
