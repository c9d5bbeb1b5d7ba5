"""The output of a removal of channels: every shape, dtype and byte, for any choice of the channels that stay.

config.json holds one width for a stage, and the groups follow: the architecture is asked. With smaller numbers there it
is built again on the meta device, and its shapes say how many channels of each group stay.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CheckpointError, Refused
from aicompress.layer import LayerInfo
from aicompress.model.architecture.shapes import build
from aicompress.model.channels.cut import Kept, attributes, kept_places, shapes_after
from aicompress.model.channels.graph import ChannelGroup, Member
from aicompress.model.channels.repair import can_refit
from aicompress.pipeline.step.output import Destination, Output, Planned, arrange
from aicompress.recipe import Recipe
from aicompress.weights import TensorSpec, Weight

FIELDS = ("embedding_size", "hidden_sizes")
STEPS = (1, 2, 4, 8, 16, 32, 64)  # widths have to be multiples of what the architecture divides them by
HINT = (
    "prune heads, feed-forward neurons or the hidden width of a transformer; channels are for networks such as ResNet"
)


def expressed(
    config: Mapping[str, Any], module: nn.Module, groups: Sequence[ChannelGroup], share: float, multiple: int
) -> tuple[dict[str, Any], list[int]]:
    """The config.json of a narrower network, and how many units of each group stay.

    Args:
        config: of the whole network.
        module: the whole network.
        groups: all its groups.
        share: of the channels that stays, at least.
        multiple: that widths are rounded up to.

    Raises:
        Refused: no config.json says what can be cut.
    """
    reason = ""
    for step in STEPS if any(field in config for field in FIELDS) else ():
        edited = _scaled(config, share, math.lcm(step, multiple))
        if share < 1 and edited == config:
            break  # rounded up to what it is
        try:
            sizes = _sizes(module, build(edited), groups)
        except CheckpointError as error:
            reason = reason or error.message
            continue
        if isinstance(sizes, list):
            return edited, sizes
        reason = reason or sizes
    reason = reason or "it holds no widths of stages, or none that is a multiple"
    raise Refused(f"config.json cannot express fewer channels: {reason}", HINT)


def _scaled(config: Mapping[str, Any], share: float, step: int) -> dict[str, Any]:
    """config.json with every width of a stage cut, rounded up."""

    def cut(width: int) -> int:
        return min(width, math.ceil(round(width * share, 6) / step) * step)

    edited = copy.deepcopy(dict(config))
    for field in FIELDS:
        value = edited.get(field)
        if isinstance(value, int):
            edited[field] = cut(value)
        elif isinstance(value, list) and all(isinstance(width, int) for width in value):
            edited[field] = [cut(width) for width in value]
    return edited


def _sizes(module: nn.Module, narrow: nn.Module, groups: Sequence[ChannelGroup]) -> list[int] | str:
    """Units of each group that a narrower network has, or why a cut cannot give its shapes."""
    wanted = {name: tuple(tensor.shape) for name, tensor in narrow.state_dict().items()}
    before = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if wanted.keys() != before.keys():
        return "it has other layers when it is narrower"
    sizes = [
        next(filter(None, (_size(module, member, group, wanted) for member in group.members)), group.size)
        for group in groups
    ]
    first = [(group, _first(group, size)) for group, size in zip(groups, sizes, strict=True)]
    after = before | shapes_after(module, kept_places(module, first))
    other = next((name for name in wanted if wanted[name] != after[name]), None)
    return sizes if other is None else f"{other} would be {wanted[other]}, a cut leaves {after[other]}"


def _size(module: nn.Module, member: Member, group: ChannelGroup, wanted: Mapping[str, tuple[int, ...]]) -> int | None:
    """Units of a group on one member of a narrower network; None where others share its place."""
    if member.axis is not None:
        length, whole = wanted[member.path][member.axis], module.get_parameter(member.path).shape[member.axis]
    elif member.side == "out" and not getattr(module.get_submodule(member.path), "transposed", False):
        length, whole = wanted[f"{member.path}.weight"][0], len(module.get_parameter(f"{member.path}.weight"))
    else:
        return None
    return max(1, length // member.places.shape[1]) if whole == group.size * member.places.shape[1] else None


def _first(group: ChannelGroup, size: int) -> list[int]:
    """The first units of every cohort."""
    return [unit for unit, place in enumerate(group.places) if place < size // (max(group.cohorts) + 1)]


@dataclass(frozen=True)
class Draft:
    """All that an output depends on beside the channels that stay.

    Attributes:
        checkpoint: the input.
        destination: where the output goes.
        recipe: what to do.
        step: this step for the lineage.
        module: the whole network.
        names: names of the checkpoint's parameters in the module.
        infos: every layer of the input.
    """

    checkpoint: Checkpoint
    destination: Destination
    recipe: Recipe
    step: dict[str, Any]
    module: nn.Module
    names: Mapping[str, str]
    infos: tuple[LayerInfo, ...]

    def output(self, kept: Mapping[str, Kept], config: dict[str, Any] | None = None) -> Output:
        """The output for a choice of channels, with the config.json that expresses it."""
        shapes = shapes_after(self.module, kept)
        infos = {info.tensor: info for info in self.infos}
        parameters: dict[str, Planned] = {}
        for name, spec in self.checkpoint.parameters().items():
            weight, info = self.checkpoint.outline(name), infos.get(name)
            target = self.names[name]
            path = target.rpartition(".")[0]
            if target in shapes:
                spec = TensorSpec(spec.dtype, shapes[target])
                if weight is not None:
                    weight = narrowed(weight, self.module.get_submodule(path), kept[path], meta=True)
                if info is not None:
                    rows = (spec.shape[0], spec.nbytes // spec.dtype.itemsize // spec.shape[0])
                    info = replace(info, shape=rows, tensor_shape=spec.shape)
            parameters[name] = Planned(spec, weight, info)
        widths = {} if self.checkpoint.config is not None else _widths(self.module, kept)
        return arrange(self.checkpoint, self.destination, parameters, self.step, config, widths)


def _widths(module: nn.Module, kept: Mapping[str, Kept]) -> dict[str, dict[str, int]]:
    return {
        path: {} if places.axis is not None else attributes(module.get_submodule(path), places)
        for path, places in kept.items()
    }


def narrowed(weight: Weight, layer: nn.Module, kept: Kept, meta: bool = False) -> Weight | None:
    """A compressed weight with the places that stay, in its own form; None where the form cannot hold them."""
    if kept.inner is not None and not can_refit(layer):
        return None  # in groups, or stored the other way round
    narrow: Weight | None = weight
    if kept.out is not None and narrow is not None:
        narrow = narrow.cut(0, kept.out.to("meta") if meta else kept.out)
    if kept.inner is not None and narrow is not None:
        tail = math.prod(getattr(layer, "kernel_size", ()))  # a kernel's elements lie beside one another in a row
        index = (kept.inner[:, None] * tail + torch.arange(tail)).reshape(-1)
        narrow = narrow.cut(1, index.to("meta") if meta else index)
    return narrow
