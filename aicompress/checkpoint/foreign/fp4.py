"""The sixteen numbers of four bits (E2M1) that MXFP4 and NVFP4 share, and tables of them as a stored form."""

from __future__ import annotations

import torch
from torch import Tensor

from aicompress.weights import Codebook

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
TABLE = (*VALUES, *(-value for value in VALUES))


def nibbles(packed: Tensor) -> Tensor:
    """(..., n) bytes -> (..., 2 n) codes uint8, the low four bits first."""
    packed = packed.view(torch.uint8)
    return torch.stack([packed & 15, packed >> 4], dim=-1).reshape(*packed.shape[:-1], -1)


def codebook(packed: Tensor, scale: Tensor) -> Codebook:
    """A matrix of such numbers, (out, in / 2) bytes, with scales (out, groups)."""
    return Codebook(nibbles(packed), torch.tensor([TABLE], dtype=scale.dtype), scale, 4)


def outline(rows: int, columns: int, groups: int, dtype: torch.dtype) -> Codebook:
    """What `codebook` gives, without data; `dtype` is that of the scales."""
    return Codebook.outline((rows, columns), 4, 1, dtype, (rows, groups))
