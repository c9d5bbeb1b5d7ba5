"""Locate a checkpoint's matrix that transformers divides among layers, such as fused query, key and value, or permutes.

Nomic's encoders store one `Wqkv`, of which the model makes three layers. They have one input, which is the matrix's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from aicompress.model.loading.merged_experts import ExpertStack, Slot, converted


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
