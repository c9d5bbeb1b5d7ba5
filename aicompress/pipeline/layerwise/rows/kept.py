"""Blocks of rows under a mask, which keep unlike numbers of elements: each is written behind the one before it."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from aicompress.checkpoint import CheckpointWriter
from aicompress.pipeline.layerwise.rows.parts import encoded
from aicompress.pipeline.step.output import Output
from aicompress.weights import Masked, SparseCodes, Weight
from aicompress.weights.coding.packing import WORD


def is_kept_apart(outline: Weight) -> bool:
    """Whether a weight holds survivors of a bit mask, one row's behind the other's."""
    return isinstance(outline, Masked) and not outline.in_proportion()


@dataclass
class KeptBlocks:
    """A parameter of which blocks are written in order.

    Attributes:
        name: the parameter.
        output, writer: where it goes.
        part: of its weight, of which these are rows; '' for all of it.
        begin: where the next block's part of a tensor begins, by its name on disk.
        rest: codes that fill no word yet.
    """

    name: str
    output: Output
    writer: CheckpointWriter
    part: str = ""
    begin: dict[str, int] = field(default_factory=dict)
    rest: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int8))

    def put(self, weight: Weight, previous: Future[Any] | None, is_last: bool) -> None:
        """Write a block once the one before it is written.

        Args:
            weight: of its rows.
            previous: writes the block before it.
            is_last: nothing follows.
        """
        if previous is not None:
            previous.result()
        if isinstance(weight, SparseCodes):
            codes = torch.cat([self.rest, weight.codes])
            whole = len(codes) if is_last else len(codes) // WORD * WORD
            weight, self.rest = replace(weight, codes=codes[:whole]), codes[whole:]
        for disk, part in encoded(self.output, self.name, weight, self.part).items():
            first = self.begin.get(disk, 0)
            if first < self.output.stored[self.name][disk].shape[0]:  # else each block gives all of it
                self.writer.put_part(disk, part, first)
            self.begin[disk] = first + len(part)
