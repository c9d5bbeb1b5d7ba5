"""Scales that lie beside a weight: how they are spread over it, and powers of two that are stored as exponents."""

from __future__ import annotations

import torch
from torch import Tensor

from aicompress.checkpoint.foreign.layout import require

BLOCK = (128, 128)  # where nothing says how large blocks are, and where the last one may be narrower


def blocks_of(shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int] | None = None) -> tuple[int, int]:
    """Rows and columns that share a scale.

    Args:
        shape: of the matrix.
        scales: shape of its scales: one, one for each row, or a grid of blocks.
        block: as the settings say; the last blocks may be narrower.

    Raises:
        ValueError: the scales do not fit the matrix.
    """
    rows, columns = shape
    scales = scales or (1,)
    if all(size == 1 for size in scales):
        return rows, columns
    if len(scales) == 1:
        require(scales[0] == rows, f"{scales[0]} scales for {rows} rows")
        return 1, columns
    for height, width in filter(None, (block, BLOCK)):
        if scales == (-(-rows // height), -(-columns // width)):
            return min(height, rows), min(width, columns)
    fits = len(scales) == 2 and all(count and not size % count for size, count in zip(shape, scales, strict=True))
    require(fits, f"scales {list(scales)} for a matrix {list(shape)}")
    return rows // scales[0], columns // scales[1]


def real(scale: Tensor) -> Tensor:
    """Scales in float32; exponents of two (E8M0), also those stored as bytes, as the powers that they mean."""
    if scale.dtype is torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.float()


def scaled_rows(rows: Tensor, scale: Tensor, block: tuple[int, int], start: int) -> Tensor:
    """Multiply rows of a matrix by their scales, in place.

    Args:
        rows: float32, from row `start` on; `start` is a multiple of the height of a block.
        scale: (rows of blocks, columns of blocks) float32.
        block: height and width.
        start: first row.
    """
    height, width = block
    for first in range(0, len(rows), height):
        across = scale[(start + first) // height].repeat_interleave(width)[: rows.shape[1]]
        rows[first : first + height] *= across
    return rows


def spread_words(shape: tuple[int, int], block: tuple[int, int]) -> str:
    """How scales are spread, in words."""
    if block == shape:
        return "one scale"
    if block == (1, shape[1]):
        return "a scale per row"
    return f"blocks of {block[0]} × {block[1]}" if block[0] > 1 else f"groups of {block[1]}"
