"""What tensors of a checkpoint give to structural units: read when it is asked for, or summed in blocks of rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.methods.structural import Part
from aicompress.pipeline.step import blocks

Take = Callable[[Tensor], Tensor]


def power_sums(checkpoint: Checkpoint, name: str, axes: Collection[int], take: Take, order: int) -> Tensor:
    """Σ |x|^order of each row that `take` gives, (units,) float64.

    Args:
        checkpoint, name: the tensor.
        axes: those that `take` picks entries along; it leaves the others as they are.
        take: (a tensor with these axes) -> (units, numbers).
        order: of the power.
    """
    shape = checkpoint.parameters()[name].shape
    others = [axis for axis in range(len(shape)) if axis not in axes]
    total = torch.zeros([length if axis in axes else 1 for axis, length in enumerate(shape)], dtype=torch.float64)
    lead = checkpoint.row_axis(name)
    for rows in checkpoint.row_blocks(name, blocks.BLOCK):
        powers = checkpoint.dense(name, rows).double().abs_().pow_(order)
        own = powers.sum(dim=others, keepdim=True) if others else powers
        within = total if rows is None or lead not in axes else total.narrow(lead, rows.start, rows.stop - rows.start)
        within.add_(own)
    return take(total).sum(dim=1)


def part(
    checkpoint: Checkpoint,
    tensor: str,
    module: str,
    role: Literal["producer", "consumer", "whole"],
    take: Take,
    axes: Collection[int],
    first: int = 0,
    span: int = 1,
) -> Part:
    """What a tensor gives to units, which is read when it is asked for.

    Args:
        checkpoint, tensor: the parameter.
        module, role, first, span: as `Part` has them.
        take: (a tensor of the parameter's shape) -> (units, numbers).
        axes: those that `take` picks entries along.
    """
    shape = checkpoint.parameters()[tensor].shape
    return Part(
        tensor,
        module,
        role,
        first,
        partial(_read, checkpoint, tensor, take),
        span,
        take,
        partial(power_sums, checkpoint, tensor, axes, take),
        single=all(length == 1 for axis, length in enumerate(shape) if axis not in axes),
    )


def offset_part(checkpoint: Checkpoint, consumer: str) -> Iterable[Part]:
    """The bias of a consumer, which can take up the mean of what goes."""
    module, _, leaf = consumer.rpartition(".")
    bias = f"{module}.bias"
    if leaf == "weight" and bias in checkpoint.parameters():
        yield Part(bias, f"{module}[0]", "offset", 0, partial(_read, checkpoint, bias, as_one_row))


def as_one_row(tensor: Tensor) -> Tensor:
    """All of a tensor for one unit, (1, numbers)."""
    return tensor.reshape(1, -1)


def _read(checkpoint: Checkpoint, tensor: str, take: Take) -> Tensor:
    return take(checkpoint.dense(tensor)).float()
