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
from aicompress.pipeline.structured.edit import Edit
from aicompress.weights import TensorSpec, Weight


def planned(checkpoint: Checkpoint, edit: Edit, name: str, infos: Mapping[str, LayerInfo]) -> Planned:
    """Outline of one parameter of the output."""
    change = edit.changes[name]
    old = checkpoint.parameters()[change.source]
    shape = list(old.shape)
    for one in change.cuts:
        shape[one.axis] -= (edit.structures[one.structure].size - edit.sizes[one.structure]) * sum(one.spans)
    spec = TensorSpec(old.dtype, tuple(shape))
    weight = None if change.refit else checkpoint.outline(change.source)
    info = infos.get(change.source)
    if weight is None or info is None:
        return Planned(spec, None, info)
    for axis in sorted({one.axis for one in change.cuts}):
        index = torch.arange(shape[axis], device="meta")
        weight = None if weight is None else cut_matrix(weight, info.transposed, old.shape, axis, index)
    columns = math.prod(spec.shape[1:])
    matrix = (columns, spec.shape[0]) if info.transposed else (spec.shape[0], columns)
    return Planned(spec, weight, replace(info, tensor=name, shape=matrix, tensor_shape=spec.shape))


def cut_matrix(weight: Weight, transposed: bool, shape: tuple[int, ...], axis: int, index: Tensor) -> Weight | None:
    """Cut the matrix (out, in) of a compressed parameter along one axis of its tensor, whose shape was `shape`."""
    across = 1 - axis if transposed else axis
    tail = math.prod(shape[2:])  # a kernel's elements lie beside one another in a row
    if across > 1:
        return None
    if across == 1 and tail > 1:
        index = (index[:, None] * tail + torch.arange(tail, device=index.device)).reshape(-1)
    return weight.cut(across, index)
