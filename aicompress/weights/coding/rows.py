"""Rows in blocks: where a tensor is cut into them, and where those of a weight lie in the tensors it is stored in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

COUNTED = 1 << 20  # bytes of a mask that are counted at a time
BITS_SET = np.array([bin(value).count("1") for value in range(256)], dtype=np.uint8)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, of which parts along its first axis are read.

    Attributes:
        read: (entries; None: all) -> those of the tensor; of one that the file holds as it is, also along an axis that
            is given behind them.
        length: of the axis.
        multiple: a part begins at a multiple of it.
        ones: how many bits are set before some entries of a bit mask, as far as that is known.
    """

    read: Callable[..., Tensor]
    length: int
    multiple: int = 1
    ones: dict[int, int] = field(default_factory=lambda: {0: 0})

    def ones_before(self, byte: int) -> int:
        """How many bits of a bit mask are set before one of its bytes: counted from the last place that is known."""
        known = max(place for place in list(self.ones) if place <= byte)
        while known < byte:
            stop = min(known + COUNTED, byte)
            counted = BITS_SET[self.read(slice(known, stop)).numpy()].sum(dtype=np.int64)
            self.ones[stop], known = self.ones[known] + int(counted), stop
        return self.ones[byte]


@dataclass(frozen=True)
class RowStorage:
    """How tensors hold rows of a weight in proportion, so that some of them can be read, and written, alone.

    Attributes:
        along: suffixes of the tensors whose first axis goes along the rows, in proportion; the others, and those of one
            entry, belong to all rows.
        meta: (number of rows) -> what the form's `meta` says of so many of them.
        multiple: a block of rows begins at a multiple of it, as rows share bytes or numbers.
    """

    along: frozenset[str]
    meta: Callable[[int], dict[str, Any]]
    multiple: int = 1

    @classmethod
    def of(cls, meta: dict[str, Any], *along: str, multiple: int = 1) -> RowStorage:
        """Of a form whose `meta` names its shape, and nothing else that depends on the rows."""
        columns = meta["shape"][1]
        return cls(frozenset(along), lambda rows: {**meta, "shape": [rows, columns]}, multiple)


def row_slices(rows: int, width: int, most: int, multiple: int = 1) -> list[slice]:
    """Blocks of rows of about so many numbers, in order; the last one may be smaller.

    Args:
        rows, width: how many there are, and the numbers in each; a tensor may be empty.
        most: numbers of a block, unless fewer rows than `multiple` would be.
        multiple: every block begins at a multiple of so many rows.
    """
    step = max(1, most // max(1, width) // multiple) * multiple
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def share(length: int, rows: slice, total: int) -> slice:
    """Where rows lie along an axis that goes along all of them in proportion; all of an axis of one entry.

    Args:
        length: of the axis.
        rows: some of them, which begin where an entry does.
        total: how many there are.
    """
    if length == 1:
        return slice(0, 1)
    return slice(length * rows.start // total, length if rows.stop == total else length * rows.stop // total)
