"""N:M masks in less than a bit per weight: which of the C(M, N) ways each group of M has its N survivors in.

Several groups share a word as the digits of a number in base C(M, N): three groups of 2:4 lie in a byte (6³ = 216), so
that a mask takes 0.67 bits per weight where its entropy is 0.65 and a bit mask takes 1. Groups are consecutive columns,
or consecutive after the columns are put in another order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations
from math import comb

import torch
from torch import Tensor

LARGEST = 16  # columns in a group; the table of C(16, 8) ways still is small


@dataclass(frozen=True)
class Grouping:
    """How the survivors of a mask are spread.

    Attributes:
        kept, size: N survivors in every group of M columns.
        order: (columns,) integer: the columns in the order in which M in a row are a group; None for their own.
    """

    kept: int
    size: int
    order: Tensor | None = None

    @classmethod
    def outline(cls, kept: int, size: int, columns: int, ordered: bool) -> Grouping | None:
        """A grouping without data; None where N:M masks are not packed: of groups too large or not whole."""
        if size > LARGEST or columns % size:
            return None
        return cls(kept, size, torch.empty(columns, dtype=index_dtype(columns), device="meta") if ordered else None)

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of a packed mask, its order included."""
        order = 0 if self.order is None else self.order.numel() * self.order.dtype.itemsize
        return self.packed_nbytes(rows * columns) + order

    def packed_nbytes(self, count: int) -> int:
        """Bytes of a packed mask of so many elements, without its order."""
        width, digits = word(self.kept, self.size)
        return -(-(count // self.size) // digits) * width

    def pack(self, mask: Tensor) -> Tensor:
        """(rows, columns) bool -> uint8 (bytes,).

        Raises:
            ValueError: some group does not have N survivors.
        """
        if mask.device.type == "meta":
            return torch.empty(self.packed_nbytes(mask.numel()), dtype=torch.uint8, device="meta")
        if self.order is not None:
            mask = mask[:, self.order.long()]
        groups = mask.reshape(-1, self.size)
        if not (groups.sum(dim=1) == self.kept).all():
            raise ValueError(f"the mask is not {self.kept}:{self.size}")
        width, digits = word(self.kept, self.size)
        bits = (groups.long() << torch.arange(self.size)).sum(dim=1)
        lookup = torch.zeros(1 << self.size, dtype=torch.int64)
        ways = table(self.kept, self.size)
        lookup[ways] = torch.arange(len(ways))
        digit = torch.nn.functional.pad(lookup[bits], (0, -len(bits) % digits)).reshape(-1, digits)
        value = (digit * len(ways) ** torch.arange(digits)).sum(dim=1)
        return ((value[:, None] >> (8 * torch.arange(width))) & 255).to(torch.uint8).reshape(-1)

    def unpack(self, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        """Undo `pack`.

        Raises:
            ValueError: the bytes are no mask of this shape, or the order is not one of its columns.
        """
        if packed.numel() != self.packed_nbytes(shape[0] * shape[1]):
            raise ValueError(f"{packed.numel()} bytes of a {self.kept}:{self.size} mask {list(shape)}")
        if self.order is not None and (self.order.is_floating_point() or self.order.shape != shape[1:]):
            raise ValueError(f"an order {list(self.order.shape)} of {shape[1]} columns")
        if packed.device.type == "meta":
            return torch.empty(shape, dtype=torch.bool, device="meta")
        width, digits = word(self.kept, self.size)
        ways = table(self.kept, self.size)
        value = (packed.reshape(-1, width).long() << (8 * torch.arange(width))).sum(dim=1)
        digit = ((value[:, None] // len(ways) ** torch.arange(digits)) % len(ways)).reshape(-1)
        count = shape[0] * shape[1] // self.size
        if bool((value >= len(ways) ** digits).any()) or bool(digit[count:].any()):
            raise ValueError(f"bytes that no {self.kept}:{self.size} mask has")
        bits = ways[digit[:count]]
        mask = ((bits[:, None] >> torch.arange(self.size)) & 1).bool().reshape(shape)
        if self.order is None:
            return mask
        order = self.order.long()
        if not torch.equal(order.sort().values, torch.arange(shape[1])):
            raise ValueError(f"an order that is not one of {shape[1]} columns")
        own = torch.empty_like(mask)
        own[:, order] = mask
        return own


def index_dtype(columns: int) -> torch.dtype:
    """The smallest integer that counts the columns."""
    return torch.int16 if columns <= 1 << 15 else torch.int32


@cache
def table(kept: int, size: int) -> Tensor:
    """(C(M, N),) int64: every way as a bit pattern, the first column in the lowest bit."""
    return torch.tensor([sum(1 << place for place in places) for places in combinations(range(size), kept)])


@cache
def word(kept: int, size: int) -> tuple[int, int]:
    """Bytes of a word and how many groups share it: of 1, 2 and 4 bytes what takes least per group."""
    ways = comb(size, kept)
    fits = {}
    for width in (1, 2, 4):
        digits = 0
        while ways ** (digits + 1) <= 1 << 8 * width and digits < 8 * width:
            digits += 1
        if digits:
            fits[width] = digits
    return min(fits.items(), key=lambda item: item[0] / item[1])


def packed(grouping: Grouping | None, rows: int, columns: int) -> Grouping | None:
    """A grouping where it makes a mask smaller than one bit per element; else None."""
    smaller = grouping is not None and grouping.nbytes(rows, columns) < -(-rows * columns // 8)
    return grouping if smaller else None
