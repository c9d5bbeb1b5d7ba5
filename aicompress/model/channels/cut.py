"""Cut channels from layers: their tensors and their attributes (`out_channels`, `groups`).

The attributes of every layer that changed are kept in the manifest, so that a module whose own definition has the old
widths can be made to fit a pruned checkpoint (`resize`). Nothing else may have another shape than its definition.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aicompress.model.channels.graph import ChannelGroup, Member
from aicompress.model.loading.resize import WIDTH_ATTRIBUTES, owner_of, put, set_widths


@dataclass(frozen=True)
class Kept:
    """Positions that stay of a layer, ascending; None where all do.

    Attributes:
        out: its outputs, or the positions of a layer that has one side only.
        inner: its inputs.
        axis: of a lone parameter.
    """

    out: Tensor | None = None
    inner: Tensor | None = None
    axis: int | None = None


def kept_places(module: nn.Module, groups: Iterable[tuple[ChannelGroup, list[int]]]) -> dict[str, Kept]:
    """What stays of every layer and lone parameter that loses channels.

    Args:
        groups: each group with the units that stay.
    """
    gone: dict[tuple[str, bool], list[Tensor]] = {}
    axes: dict[str, int | None] = {}
    for group, units in groups:
        stays = torch.zeros(group.size, dtype=torch.bool)
        stays[units] = True
        if bool(stays.all()):
            continue
        for member in group.members:
            gone.setdefault((member.path, member.side == "in"), []).append(member.places[~stays].reshape(-1))
            axes[member.path] = member.axis
    by_path: dict[str, Kept] = {}
    for (path, inner), places in gone.items():
        stays = torch.ones(_width(module, path, inner, axes[path]), dtype=torch.bool)
        stays[torch.cat(places)] = False
        kept, old = stays.nonzero()[:, 0], by_path.get(path, Kept())
        by_path[path] = Kept(old.out, kept, axes[path]) if inner else Kept(kept, old.inner, axes[path])
    return by_path


def _width(module: nn.Module, path: str, inner: bool, axis: int | None) -> int:
    if axis is not None:
        return module.get_parameter(path).shape[axis]
    layer: Any = module.get_submodule(path)
    if isinstance(layer, nn.Linear):
        return layer.in_features if inner else layer.out_features
    if isinstance(layer, nn.modules.conv._ConvNd):
        return layer.in_channels if inner else layer.out_channels
    if isinstance(layer, nn.LayerNorm):
        return layer.normalized_shape[0]
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim
    for name in ("num_features", "num_channels", "num_parameters"):
        if hasattr(layer, name):
            return int(getattr(layer, name))
    raise TypeError(f"{type(layer).__name__} has no channels")


def attributes(layer: nn.Module, kept: Kept) -> dict[str, int]:
    """The attributes of a layer after the cut."""
    lengths: dict[str, int] = {}
    out = None if kept.out is None else len(kept.out)
    inner = None if kept.inner is None else len(kept.inner)
    if isinstance(layer, nn.Linear):
        lengths = {"out_features": out or layer.out_features, "in_features": inner or layer.in_features}
    elif isinstance(layer, nn.modules.conv._ConvNd):
        if is_depthwise(layer):
            lengths = dict.fromkeys(("out_channels", "in_channels", "groups"), out or layer.groups)
        else:
            lengths = {"out_channels": out or layer.out_channels, "in_channels": inner or layer.in_channels}
    elif out is not None:
        lengths = {name: out for name in WIDTH_ATTRIBUTES[5:] if hasattr(layer, name)}
    return lengths


def is_depthwise(layer: nn.Module) -> bool:
    """Whether every channel of a convolution has one kernel of its own."""
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return False
    return 1 < layer.groups == layer.in_channels == layer.out_channels


def shapes_after(module: nn.Module, kept: Mapping[str, Kept]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of all layers that lose something, by their names in the module."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, places in kept.items():
        if places.axis is not None:
            assert places.out is not None
            shape = list(module.get_parameter(path).shape)
            shape[places.axis] = len(places.out)
            shapes[path] = tuple(shape)
            continue
        layer = module.get_submodule(path)
        for leaf, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
            shape = list(tensor.shape)
            if leaf == "weight" and tensor.ndim > 1:
                out_axis, in_axis = matrix_axes(layer)
                if places.inner is not None:
                    shape[in_axis] = len(places.inner) // getattr(layer, "groups", 1)
                if places.out is not None:
                    shape[out_axis] = len(places.out)
            elif tensor.ndim and places.out is not None:
                shape[0] = len(places.out)
            shapes[f"{path}.{leaf}" if path else leaf] = tuple(shape)
    return shapes


def matrix_axes(layer: nn.Module) -> tuple[int, int]:
    """Axes of a weight's outputs and inputs."""
    return (1, 0) if isinstance(layer, nn.Embedding) or getattr(layer, "transposed", False) else (0, 1)


def unit_rows(module: nn.Module, member: Member, leaf: str) -> Tensor:
    """What one tensor of a layer holds of each unit of a group, (units, numbers)."""
    if member.axis is not None:
        rows: Tensor = module.get_parameter(member.path).detach().movedim(member.axis, 0)
        return rows.flatten(1)[member.places].flatten(1) if rows.ndim > 1 else rows[member.places]
    layer: Any = module.get_submodule(member.path)
    tensor: Tensor = getattr(layer, leaf).detach()
    if leaf != "weight" or tensor.ndim == 1:
        return tensor[member.places]
    out_axis, in_axis = matrix_axes(layer)
    if member.side != "in":
        rows = tensor.movedim(out_axis, 0)
    elif getattr(layer, "groups", 1) > 1:  # (groups, out, in, k) of each group -> (inputs, out, k)
        split = tensor.reshape(layer.groups, -1, *tensor.shape[1:]).transpose(1, 2)
        rows = split.reshape(layer.in_channels, *split.shape[2:])
    else:
        rows = tensor.movedim(in_axis, 0)
    return rows.flatten(1)[member.places].flatten(1)


def cut_layer(layer: nn.Module, leaf: str, tensor: Tensor, kept: Kept) -> Tensor:
    """One tensor of a layer with the positions that stay.

    Args:
        layer: still with its old attributes.
        leaf: weight, bias, running_mean, ...
        tensor: its value; not modified.
    """
    if not tensor.ndim:
        return tensor  # num_batches_tracked
    if leaf != "weight" or tensor.ndim == 1:
        return tensor if kept.out is None else tensor.index_select(0, kept.out)
    out_axis, in_axis = matrix_axes(layer)
    if kept.inner is not None:
        groups = getattr(layer, "groups", 1)
        tensor = _cut_grouped(tensor, kept.inner, groups) if groups > 1 else tensor.index_select(in_axis, kept.inner)
    return tensor if kept.out is None else tensor.index_select(out_axis, kept.out)


def _cut_grouped(weight: Tensor, kept: Tensor, groups: int) -> Tensor:
    """Inputs of a grouped convolution (out, in/groups, *k): as many stay in each group, others in each."""
    rows, width = weight.shape[0] // groups, weight.shape[1]
    within = (kept % width).reshape(groups, -1)  # (groups, stay)
    index = within.repeat_interleave(rows, 0)  # (out, stay)
    index = index.reshape(*index.shape, *[1] * (weight.ndim - 2)).expand(-1, -1, *weight.shape[2:])
    return weight.gather(1, index)


def cut_module(module: nn.Module, kept: Mapping[str, Kept]) -> dict[str, dict[str, int]]:
    """Cut the layers of a module in place; returns the widths that it has now."""
    widths: dict[str, dict[str, int]] = {}
    for path, places in kept.items():
        if places.axis is not None:
            assert places.out is not None
            value = module.get_parameter(path).detach().index_select(places.axis, places.out)
            put(*owner_of(module, path), value)
            widths[path] = {}
            continue
        layer = module.get_submodule(path)
        for leaf, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
            put(layer, leaf, cut_layer(layer, leaf, tensor.detach(), places))
        widths[path] = attributes(layer, places)
        set_widths(layer, widths[path])
    return widths
