"""What the sparse forms share: a mask of one bit per element, or less where it is N:M."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aicompress.weights.coding.packing import pack_mask, unpack_mask
from aicompress.weights.coding.rows import StoredTensor
from aicompress.weights.decoding import require_kept
from aicompress.weights.form import Symbols, Weight, require_dtype
from aicompress.weights.grouping import Grouping, word


class Masked(Weight):
    """A form that stores the elements under a mask; the others are exactly zero.

    Attributes:
        mask: (out, in) bool, True where an element is kept.
        grouping: N and M where the mask is N:M and packed as such.
    """

    mask: Tensor
    grouping: Grouping | None

    @property
    def shape(self) -> tuple[int, int]:
        return (self.mask.shape[0], self.mask.shape[1])

    def row_multiple(self) -> int:
        """Of a bit mask rows that end with a byte, of an N:M mask those that `row_storage` says."""
        return super().row_multiple() if self.grouping is not None else 8 // math.gcd(8, self.shape[1])

    def read_mask(self, stored: StoredTensor, rows: slice) -> tuple[Tensor, slice]:
        """Some rows of a bit mask, and where what they keep lies among all that is kept.

        Raises:
            ValueError: more is kept than is stored, or at the last row less.
        """
        (total, columns), height = self.shape, rows.stop - rows.start
        part = slice(rows.start * columns // 8, -(-rows.stop * columns // 8))
        mask = unpack_mask(stored.read(part), height * columns).reshape(height, columns)
        first = stored.ones_before(part.start)
        last = stored.ones[part.stop] = first + int(mask.sum())
        if last > self.numbers() or (rows.stop == total and last < self.numbers()):
            raise ValueError(f"{self.numbers()} elements are stored under a mask that keeps {last}")
        return mask, slice(first, last)

    def zeros(self) -> str:
        """The share of zeros in words."""
        pattern = "" if self.grouping is None else f", {self.grouping.kept}:{self.grouping.size}"
        return f"{100 * (1 - self.numbers() / max(1, self.mask.numel())):.3g}% zeros{pattern}"


def mask_tensors(mask: Tensor, grouping: Grouping | None) -> dict[str, Tensor]:
    """A mask as it is stored, by suffix."""
    if grouping is None:
        return {"": pack_mask(mask.reshape(-1))}
    stored = {"": grouping.pack(mask)}
    return stored if grouping.order is None else {**stored, "order": grouping.order}


def mask_symbols(mask: Tensor, grouping: Grouping | None) -> dict[str, Symbols]:
    """How the first of `mask_tensors` holds them."""
    if grouping is None:
        return {"": Symbols("mask", mask.shape[0], mask.shape[1])}
    return {"": Symbols("bytes", 1, grouping.packed_nbytes(mask.numel()))}


def mask_meta(grouping: Grouping | None) -> dict[str, Any]:
    """What a reader needs beside the tensors."""
    return {} if grouping is None else {"pattern": [grouping.kept, grouping.size]}


def rows_of_words(grouping: Grouping | None) -> int:
    """How many rows have an N:M mask of whole words, whatever their length; 0 of a mask that is none."""
    return 0 if grouping is None else word(grouping.kept, grouping.size)[1]


def restored_mask(tensors: Mapping[str, Tensor], meta: Mapping[str, Any], kept: int) -> tuple[Tensor, Grouping | None]:
    """Undo `mask_tensors` and `mask_meta`.

    Returns:
        (out, in) bool, and the grouping.

    Raises:
        ValueError: the mask keeps another number of elements than are stored, or is no mask of this shape.
    """
    out, columns = meta["shape"]
    require_dtype("mask", tensors[""], torch.uint8)
    if "pattern" not in meta:
        mask, grouping = unpack_mask(tensors[""], out * columns).reshape(out, columns), None
    else:
        survivors, size = meta["pattern"]
        grouping = Grouping(int(survivors), int(size), tensors.get("order"))
        mask = grouping.unpack(tensors[""], (out, columns))
    require_kept(mask, kept)
    return mask, grouping
