"""Parameters that are written block by block, each of some rows."""

from __future__ import annotations

import math
from typing import TypeAlias

from torch import Tensor

from aicompress.checkpoint import Checkpoint, CheckpointWriter
from aicompress.checkpoint.layouts import native_names
from aicompress.pipeline.step.output import Output
from aicompress.weights import Weight
from aicompress.weights.coding.rows import row_slices

BLOCK = 1 << 21  # numbers that are read at a time

Block: TypeAlias = tuple[Tensor | Weight, slice | None]  # with the entries of the row axis that it holds; None: all


def copied_in_parts(checkpoint: Checkpoint, source: str, output: Output, writer: CheckpointWriter, name: str) -> bool:
    """Copy a compressed parameter whose rows are not in proportion, a part of a tensor at a time; says whether it did.

    Args:
        checkpoint, source: the parameter of the input.
        output, writer, name: where it goes, and as what.

    Raises:
        CheckpointError: it is not what its description says, or a scale, factor or value of it is NaN or infinite.
    """
    blocks, outline = checkpoint.row_blocks(source, BLOCK), checkpoint.outline(source)
    if outline is None or outline.in_proportion() or blocks == [None]:
        return False
    for rows in blocks:
        checkpoint.weight(source, rows)  # looks at all of it
    stored = checkpoint.in_parts(source)[1]
    names = native_names(name, stored)
    for suffix, tensor in stored.items():
        own = output.stored[name].get(names[suffix])
        for part in [] if own is None else row_slices(tensor.length, math.prod(own.shape[1:]), BLOCK, tensor.multiple):
            writer.put_part(names[suffix], tensor.read(part), part.start)
    return True


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
