"""Outlines of a structural output's parameters: what the cuts leave of shapes and stored forms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.layer import LayerInfo
from aicompress.pipeline.step.output import Planned
from aicompress.pipeline.structured.axes import Along, along, length_of
from aicompress.pipeline.structured.edit import Edit
from aicompress.weights import PerExpert, TensorSpec, Weight


def planned(checkpoint: Checkpoint, edit: Edit, name: str, infos: Mapping[str, LayerInfo]) -> Planned:
    """Outline of one parameter of the output."""
    change = edit.changes[name]
    old = checkpoint.parameters()[change.source]
    shape = list(old.shape)
    for one in change.cuts:
        structure = edit.structures[one.structure]
        gone = (structure.size - edit.sizes[one.structure]) * sum(one.spans)
        shape[one.axis] -= gone // structure.groups if one.stacked else gone
    spec = TensorSpec(old.dtype, tuple(shape))
    weight = None if change.refit else checkpoint.outline(change.source)
    info = infos.get(change.source)
    if weight is None or info is None:
        return Planned(spec, None, info)
    for where in along(change.cuts):
        index = torch.arange(length_of(shape, where), device="meta")
        weight = None if weight is None else cut_matrix(weight, info.transposed, old.shape, where, index)
    columns = spec.shape[-1] if info.kind == "experts" else math.prod(spec.shape[1:])
    if info.kind == "experts":
        rows = math.prod(spec.shape) // columns
        return Planned(spec, weight, replace(info, tensor=name, shape=(rows, columns), tensor_shape=spec.shape))
    matrix = (columns, spec.shape[0]) if info.transposed else (spec.shape[0], columns)
    return Planned(spec, weight, replace(info, tensor=name, shape=matrix, tensor_shape=spec.shape))


def cut_matrix(weight: Weight, transposed: bool, shape: tuple[int, ...], where: Along, index: Tensor) -> Weight | None:
    """Cut the matrix (out, in) of a compressed parameter along one axis of its tensor, whose shape was `shape`."""
    axis, stacked = where
    if stacked:  # of experts one below the other; the columns that stay are not the same for all
        return weight.cut(0, index) if axis == 1 and weight.shape == (shape[0] * shape[1], shape[2]) else None
    if len(shape) == 3 and weight.shape == (shape[0] * shape[1], shape[2]) and shape[1] > 1:  # experts
        if isinstance(weight, PerExpert) and axis == 0:
            return weight.chosen(index)
        rows = (index[:, None] * shape[1] + torch.arange(shape[1], device=index.device)).reshape(-1)
        return weight.cut(0, rows) if axis == 0 else None
    across = 1 - axis if transposed else axis
    tail = math.prod(shape[2:])  # a kernel's elements lie beside one another in a row
    if across > 1:
        return None
    if across == 1 and tail > 1:
        index = (index[:, None] * tail + torch.arange(tail, device=index.device)).reshape(-1)
    return weight.cut(across, index)
