"""Low-rank factors in bfloat16 on the matrix unit of x86 processors: both products at once, rows by rows.

What lies between the products stays in the cache, and of the inputs no more than the last rows are copied. PyTorch's
own calls take 15 µs each before they multiply, and twice as long for what reads and writes much and multiplies little.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from aicompress.model.kernels.openmp import parallel, run

SIDE = 32  # inputs, ranks, outputs and rows are multiplied by so many, as in `amx_compiled`
DEEP = 64  # rows of a share, whose inputs and outputs stay in the second-level cache with small factors
LARGE = 3 << 18  # numbers of factors that go through that cache anew for every share, which then has twice the rows
MOST = 1 << 29  # multiply-adds
WIDEST = 4096  # inputs and outputs
LEAST = 1 << 17  # numbers of factors: it takes half a second until compiled code is loaded


@cache
def compiled() -> int | None:
    """Address of the compiled function; None where numba, the processor's instructions or GNU's OpenMP are missing.

    Compiling takes a second, once: later processes find the code in numba's cache, where that has a folder.
    """
    supported = torch.cpu._is_amx_tile_supported() and torch.cpu._is_avx512_bf16_supported()
    if not supported or not torch.cpu._init_amx() or parallel() is None:  # Linux has to allow it to every process
        return None
    try:
        from aicompress.model.kernels import amx_compiled
    except ImportError:
        return None
    return int(amx_compiled.two_products.address)


def _by_tiles(matrix: Tensor) -> Tensor:
    """(columns, depth) as (columns / 16, depth / 32, 16, 16, 2): what one instruction multiplies lies together."""
    columns, depth = matrix.shape
    return matrix.view(columns // 16, 16, depth // SIDE, 16, 2).permute(0, 2, 3, 1, 4).contiguous()


def _shapes() -> Tensor:
    """The table that gives all tiles 16 rows of 64 bytes, as LDTILECFG reads it (Intel's manual, volume 2)."""
    table = torch.zeros(64, dtype=torch.uint8)
    table[0] = 1
    table[16:32:2] = 64
    table[48:56] = 16
    return table


def fits(out: int, rank: int, columns: int) -> bool:
    """Whether the compiled products take a layer, and are worth it; a rank is filled up with zeros."""
    whole = out % SIDE == 0 == columns % SIDE and min(out, columns) > 0
    return whole and max(out, columns) <= WIDEST and rank * (out + columns) >= LEAST


class TiledFactors:
    """Two factors in the order of the products.

    Args:
        right, left: (rank, in) and (out, rank).
        bias: (out,) or None.

    Attributes:
        most: rows up to which these products are fast.
    """

    def __init__(self, right: Tensor, left: Tensor, bias: Tensor | None) -> None:
        short = -len(right) % SIDE
        self.out, self.columns, self.rank = len(left), right.shape[1], len(right) + short
        self.right = _by_tiles(pad(right.bfloat16(), (0, 0, 0, short)))
        self.left = _by_tiles(pad(left.bfloat16(), (0, short)))
        self.deep = DEEP if self.right.numel() + self.left.numel() <= LARGE else 2 * DEEP
        self.most = MOST // (self.rank * (self.columns + self.out))
        self.zeros, self.shapes = torch.zeros(self.rank, dtype=torch.float32), _shapes()
        self.bias = torch.zeros(self.out, dtype=torch.float32) if bias is None else bias.detach().float().contiguous()

    def serves(self, rows: int) -> bool:
        """Whether every thread has rows to work on, and PyTorch, which keeps more in the cache, is no faster."""
        return SIDE * (torch.get_num_threads() - 1) < rows <= self.most

    def multiply(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), both in bfloat16.

        Large products push Python's own memory out of the cache, so that each call made here costs several times its
        usual time: whole numbers of tiles take none but one for the outputs.
        """
        x = x.contiguous()
        count = x.numel() // self.columns
        short = -count % SIDE
        rows, whole = count + short, count + short - (SIDE if short else 0)
        behind = pad(x.view(-1, self.columns)[whole:], (0, 0, 0, short)) if short else x
        product = torch.empty((rows, self.out) if short else (*x.shape[:-1], self.out), dtype=torch.bfloat16)
        threads = torch.get_num_threads()
        deep = min(self.deep, -(-rows // (threads * SIDE)) * SIDE)
        entry = compiled()
        assert entry is not None
        run(
            *(entry, -(-rows // deep), threads, deep, rows, whole, self.columns, self.rank, self.out),
            *(x.data_ptr(), behind.data_ptr(), self.right.data_ptr(), self.left.data_ptr()),
            *(self.bias.data_ptr(), self.zeros.data_ptr(), product.data_ptr(), self.shapes.data_ptr()),
        )
        return product[:count].view(*x.shape[:-1], self.out) if short else product
