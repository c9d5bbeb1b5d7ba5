"""Parameters that are written block by block, each of some rows."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

from aicompress.checkpoint import CheckpointWriter
from aicompress.pipeline.step.output import Output
from aicompress.weights import Weight

BLOCK = 1 << 21  # numbers that are read at a time

Block: TypeAlias = tuple[Tensor | Weight, slice | None]  # with the entries of the row axis that it holds; None: all


def put_block(output: Output, writer: CheckpointWriter, name: str, block: Block, axis: int = 0) -> None:
    """Write what some rows of a parameter are in an output, where its rows are stored in proportion.

    Args:
        output, writer: where it goes.
        name: the parameter.
        block: a part of it, or all of it.
        axis: that its rows lie along in a plain tensor.
    """
    value, rows = block
    for disk, tensor in output.encode(name, value).items():
        if rows is None:
            writer.put(disk, tensor)
        elif isinstance(value, Tensor):
            writer.put_part(disk, tensor, rows.start, axis)
        else:
            writer.put_rows(disk, tensor, rows.start, output.parameters[name].dense.shape[axis])
