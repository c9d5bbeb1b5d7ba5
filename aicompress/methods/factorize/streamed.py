"""The closest factors of a matrix that is read in blocks of rows, several times, and never held.

What is held is a block or a panel of blocks, and beside it first the smaller Gram matrix (n, n) with its eigenvectors,
which are n² + n rank float64, or 2 n² for ranks above n / 3 and for singular values alone, and then the factors. The
Gram matrix of the columns is added up in one reading. That of the rows of a wide matrix takes the products of all pairs
of rows: with P panels of `PANEL` weights the matrix is read (P + 1) / 2 times. Few directions of a large matrix are
found by subspace iteration (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithm 4.4): a tall matrix is read
six times, a wide one ten times. Of a tall one the range of its rows is iterated on, Wᵀ W at a time, so that nothing
of as many rows is held: it is the space of the rows of Qᵀ W for a basis Q of the range of W (Wᵀ W)^4 P.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aicompress.methods.factorize import decomposition
from aicompress.methods.factorize.decomposition import (
    BLOCK,
    OVERSAMPLING,
    POWER_ITERATIONS,
    add_gram,
    directions,
    exact,
    few,
)

PANEL = 1 << 23  # weights of a wide matrix that are held in float64 while the others pass by: 64 MiB


@dataclass(frozen=True)
class Rows:
    """A matrix in blocks of rows.

    Attributes:
        shape: (out, in).
        blocks: functions that read its blocks, first rows first.
        places: which rows each block is, once it has been read.
    """

    shape: tuple[int, int]
    blocks: Sequence[Callable[[], Tensor]]
    places: list[slice] = field(default_factory=list)

    @property
    def tall(self) -> bool:
        return self.shape[0] >= self.shape[1]

    def each(self) -> Iterator[tuple[slice, Tensor]]:
        """Where the rows of a block are, and these."""
        start = 0
        for read in self.blocks:
            block = read()
            place = slice(start, start + len(block))
            if len(self.places) < len(self.blocks):
                self.places.append(place)
            yield place, block
            start = place.stop

    def times(self, right: Tensor) -> Tensor:
        """W times a matrix of few columns, (out, k)."""
        product = torch.empty(self.shape[0], right.shape[1], dtype=right.dtype)
        for rows, block in self.each():
            torch.mm(block, right, out=product[rows])
        return product

    def projected(self, left: Tensor) -> Tensor:
        """Lᵀ W for a matrix L (out, k), (k, in)."""
        product = torch.zeros(left.shape[1], self.shape[1], dtype=left.dtype)
        for rows, block in self.each():
            product.addmm_(left[rows].t(), block)
        return product


@dataclass(frozen=True)
class Factors:
    """W ≈ O I, with what gives the rows of O.

    Attributes:
        inner: I, (rank, in) float32.
        right: O = W R for this one, (in, rank) float32; None where O is there.
        out: O in the blocks of W.
    """

    inner: Tensor
    right: Tensor | None = None
    out: list[Tensor] = field(default_factory=list)


def squared_singular_values(rows: Rows) -> Tensor:
    """σ² in descending order, (min(out, in),) float64."""
    ascending: Tensor = torch.linalg.eigvalsh(gram(rows), UPLO="U")
    return ascending.flip(0).clamp_min_(0)


def gram(rows: Rows) -> Tensor:
    """The smaller of W Wᵀ and Wᵀ W, in float64; of W Wᵀ the upper triangle."""
    if len(rows.blocks) == 1:
        return decomposition.gram(rows.blocks[0]())
    side = min(rows.shape)
    total = torch.zeros(side, side, dtype=torch.float64)
    if rows.tall:
        for _, block in rows.each():
            _add_in_pieces(total, block)
        return total
    first, start = 0, 0
    while first < len(rows.blocks):
        first, start = _fill_panel(total, rows, first, start)
    return total


def _add_in_pieces(total: Tensor, block: Tensor) -> None:
    """Add blockᵀ block, few rows of it in float64 at a time."""
    for piece in torch.split(block, max(1, BLOCK // block.shape[1])):
        add_gram(total, piece.double())


def _fill_panel(total: Tensor, rows: Rows, first: int, start: int) -> tuple[int, int]:
    """Fill those rows of W Wᵀ that a panel of blocks is, from its own columns on.

    Args:
        total: W Wᵀ.
        rows: W.
        first: the first block of the panel.
        start: its first row.

    Returns:
        The first block after the panel, and its first row.
    """
    count = len(rows.blocks)
    after = min(count, first + max(1, PANEL * count // (rows.shape[0] * rows.shape[1])))
    panel = torch.cat([read() for read in rows.blocks[first:after]]).double()
    own = slice(start, start + len(panel))
    torch.mm(panel, panel.t(), out=total[own, own])
    place = own.stop
    for read in rows.blocks[after:]:
        block = read().double()
        torch.mm(panel, block.t(), out=total[own, place : place + len(block)])
        place += len(block)
    return after, own.stop


def factors(rows: Rows, rank: int, seed: int = 0) -> Factors:
    """U √Σ and √Σ Vᵀ."""
    if few(rows.shape, rank):
        return _few_of_tall(rows, rank, seed) if rows.tall else _few_of_wide(rows, rank, seed)
    root, inverse = directions(gram(rows), rank)
    if rows.tall:
        return Factors(root, right=inverse.t())
    out, inner = root.t(), rows.projected(inverse.t())
    return Factors(inner, out=[out[place] for place in rows.places])


def _few_of_tall(rows: Rows, rank: int, seed: int) -> Factors:
    """Factors of W V for a basis V of about its leading right singular vectors."""
    basis = _probes(rows, rank, seed)
    for _ in range(POWER_ITERATIONS + 1):
        product = torch.zeros_like(basis)
        for _, block in rows.each():
            product.addmm_(block.t(), block @ basis)
        basis = torch.linalg.qr(product).Q
    small = torch.zeros(basis.shape[1], basis.shape[1], dtype=torch.float64)
    for _, block in rows.each():
        add_gram(small, (block @ basis).double())
    root, inverse = directions(small, rank)
    return Factors(root @ basis.t(), right=basis @ inverse.t())


def _few_of_wide(rows: Rows, rank: int, seed: int) -> Factors:
    """Factors of W projected on a basis of about its leading left singular vectors."""
    basis = torch.linalg.qr(rows.times(_probes(rows, rank, seed))).Q  # (out, rank + oversampling)
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(rows.times(torch.linalg.qr(rows.projected(basis).t()).Q)).Q
    out, inner = exact(rows.projected(basis), rank)
    out = basis @ out
    return Factors(inner, out=[out[place] for place in rows.places])


def _probes(rows: Rows, rank: int, seed: int) -> Tensor:
    return torch.randn(rows.shape[1], rank + OVERSAMPLING, generator=torch.Generator().manual_seed(seed))
