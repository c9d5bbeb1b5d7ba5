"""Locate checkpoint tensors inside parameters that transformers keeps merged, or divides among layers.

Checkpoints hold a matrix per expert, `experts.3.w1.weight`; the model one tensor, `experts.gate_up_proj` (experts, out,
in). How they are merged is known to transformers alone, so it is found out with a probe: small numbered matrices are
merged as the real ones would be.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """Where a merged parameter of the checkpoint lies.

    Attributes:
        module: path of the module that keeps the merged tensor.
        leaf: its name there; the tensor is (experts, rows, columns).
        expert: index along the first dimension.
        begin: first row and column of the part.
        transposed: it lies there as (in, out).
    """

    module: str
    leaf: str
    expert: int
    begin: tuple[int, int]
    transposed: bool

    def read(self, merged: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The matrix of a shape out of its part of the merged tensor."""
        (row, column), (rows, columns) = self.begin, shape[::-1] if self.transposed else shape
        part = merged[self.expert, row : row + rows, column : column + columns]
        return part.t() if self.transposed else part

    def write(self, merged: Tensor, dense: Tensor) -> None:
        """Put a matrix into its part of the merged tensor, in place."""
        part = dense.t() if self.transposed else dense
        (row, column), (rows, columns) = self.begin, part.shape
        merged[self.expert, row : row + rows, column : column + columns] = part


@dataclass(frozen=True)
class ExpertStack:
    """Where a parameter of the checkpoint lies that holds the matrices of several experts, as the model has it.

    Attributes:
        module: path of the module that keeps the tensor.
        leaf: its name there; the tensor is (experts, rows, columns), or those one below the other.
        count: number of experts.
    """

    module: str
    leaf: str
    count: int

    def parts(self, whole: Tensor) -> Tensor:
        """The tensor as (experts, rows, columns)."""
        return whole.view(self.count, -1, whole.shape[-1])


def in_order(sources: Mapping[str, Any]) -> list[str]:
    """Names with their numbers in numerical order: expert 2 before expert 10."""
    return sorted(sources, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])


def converted(model: Any, target: str, sources: Mapping[str, tuple[Any, Tensor]]) -> dict[str, Tensor]:
    """What transformers makes of the tensors that it merges into `target`.

    Args:
        model: the transformers model.
        target: name of the merged parameter.
        sources: (conversion, tensor) by name in the checkpoint, as `parameter_names` gives the conversion.
    """
    names = in_order(sources)
    converter = copy.deepcopy(sources[names[0]][0][1])
    for name in names:
        (pattern, _), tensor = sources[name]
        converter.add_tensor(target, name, pattern, tensor)
    tensors = converter.convert(target, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in tensors.items()}


def slots(model: Any, target: str, sources: Mapping[str, tuple[Any, tuple[int, ...]]]) -> dict[str, Slot]:
    """The part of each source in the merged tensor; empty where the parts are no blocks of matrices.

    A conversion may do something else, such as permuting rows for rotary embeddings, which fails for a matrix that is
    no larger than a probe.

    Args:
        sources: (conversion, shape) by name in the checkpoint.
    """
    probes = {
        name: (conversion, torch.tensor([[2.0 * number, 2.0 * number + 1]]))
        for number, (name, (conversion, _)) in enumerate(sources.items())
    }
    try:
        merged = converted(model, target, probes).get(target)
    except RuntimeError:
        return {}
    shapes = {shape for _, shape in sources.values()}
    if merged is None or merged.ndim != 3 or merged.numel() != 2 * len(sources) or len(shapes) != 1:
        return {}
    slots: dict[str, Slot] = {}
    module, _, leaf = target.rpartition(".")
    (shape,) = shapes
    for number, name in enumerate(sources):
        first, second = ((merged == 2 * number + half).nonzero()[0].tolist() for half in (0, 1))
        transposed = first[1] != second[1]  # the two numbers of a row lie below each other
        height, width = shape[::-1] if transposed else shape
        # Where the probe is one row of two numbers, the matrix is `height` rows of `width`.
        begin = (first[1] // 2 * height, first[2] * width) if transposed else (first[1] * height, first[2] // 2 * width)
        slots[name] = Slot(module, leaf, first[0], begin, transposed)
    return slots


@dataclass(frozen=True)
class Divided:
    """Where the rows of a checkpoint's matrix lie.

    Attributes:
        module: path of the first of the layers that have them.
    """

    module: str


Place: TypeAlias = str | Slot | ExpertStack | Divided  # where the model has a parameter of the checkpoint


def divided(model: Any, name: str, target: str, conversion: Any, shape: tuple[int, ...]) -> Divided | None:
    """The layers that have all rows of a matrix between them; None where it becomes something else.

    Args:
        model: the transformers model.
        name: of the matrix in the checkpoint.
        target: name in the model of what it becomes, or of the first part.
        conversion: as `parameter_names` gives it.
        shape: (out, in) of the matrix.
    """
    try:
        made = converted(model, target, {name: (conversion, torch.empty(shape, device="meta"))})
    except RuntimeError:  # it needs another matrix, too
        return None
    rows = [value.shape[0] for value in made.values() if value.ndim == 2 and value.shape[1:] == shape[1:]]
    layers = all(full.endswith(".weight") for full in made)
    whole = target in made and len(rows) == len(made) and sum(rows) == shape[0]
    return Divided(target.removesuffix(".weight")) if layers and whole else None


def rows_of_layers(model: Any, name: str, target: str, conversion: Any, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Numbers of the matrix's rows by path of the layer that has them, found out with a matrix of row numbers.

    Args:
        model, name, target, conversion, shape: as `divided` takes them.
    """
    numbered = torch.arange(shape[0], dtype=torch.float64)[:, None].expand(shape)
    made = converted(model, target, {name: (conversion, numbered)})
    return {full.removesuffix(".weight"): part[:, 0].long() for full, part in made.items()}
