"""Matrices in oneDNN's own order, which PyTorch neither copies nor pickles by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Prepacked:
    """A matrix in oneDNN's own order. Nothing changes it, so copies of a layer share it.

    Args:
        matrix: (out, in) bfloat16, or codes (out, in) int8.

    Attributes:
        tensor: the matrix for oneDNN's products, and for no other operation.
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.dtype is torch.int8:
            self.tensor = torch.ops.onednn.qlinear_prepack(matrix.contiguous(), None)
        else:
            self.tensor = torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), None)

    def dense(self) -> Tensor:
        """The matrix as it was given."""
        plain: Tensor = self.tensor.to_dense()
        return plain.t().contiguous() if plain.dtype is torch.int8 else plain  # codes are packed (in, out)

    def __deepcopy__(self, memo: dict[int, Any]) -> Prepacked:
        return self

    def __reduce__(self) -> tuple[type[Prepacked], tuple[Tensor]]:
        return Prepacked, (self.dense(),)
