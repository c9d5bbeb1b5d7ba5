"""Linear layers on PyTorch's int4 kernel, `_weight_int4pack_mm_for_cpu`: codes of at most 4 bits in groups."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aicompress.model.kernels.linear import Bfloat16Linear, FastLinear, has_fast_bfloat16
from aicompress.weights import IntGrouped
from aicompress.weights.stored.int_grouped import spread

INT4_GROUPS = (256, 128, 64, 32)  # group sizes of the kernel, largest first
INT4_ROWS = 16  # above this many rows, decoding and a plain product is faster
KEPT_ROWS = 8  # the same where the decoded matrix is held


class Int4Linear(FastLinear):
    """Codes of at most 4 bits in groups of 32 to 256: 1 byte per weight; 6x up to 8 rows, 2x from 64 rows on.

    The kernel's w = (u - 8) * scale + zero, u = q + 8; so a zero point z enters as -z * scale. Two and three bits are
    widened to four.

    Args:
        keep: hold the decoded matrix too, packed in bfloat16 where that is fast, for products of many rows: no slower
            than a dense layer, and as large.
    """

    kernel = "int4"

    def __init__(self, weight: IntGrouped, bias: Tensor | None, group: int, keep: bool = False) -> None:
        super().__init__(weight.shape, bias)
        out, columns = weight.shape
        self.group = group
        groups, size = columns // group, weight.group_size // group
        scale = spread(weight.scale.float(), groups, size).expand(out, -1)
        zero = torch.zeros_like(scale)
        if weight.zero is not None:
            zero = -spread(weight.zero.float(), groups, size) * scale
        self.scales_and_zeros = torch.stack([scale, zero], -1).transpose(0, 1).bfloat16().contiguous()
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.int() + 8, 1)
        self.affine = weight.zero is not None
        # Without bfloat16 instructions a product in bfloat16 takes several times one in float32.
        self.wide = torch.bfloat16 if has_fast_bfloat16() else torch.float32
        self.kept = (
            None if not keep else Bfloat16Linear(weight.dense(), bias) if has_fast_bfloat16() else weight.dense()
        )
        self.rows = KEPT_ROWS if keep else INT4_ROWS
        if keep:
            self.kernel = f"int4, dense above {KEPT_ROWS} rows"
            return
        # The same codes by halves of a row: low nibble column j, high nibble column j + in/2.
        low, high = weight.codes.chunk(2, dim=1)
        self.halves = (low & 15) | (high << 4)

    def multiply(self, x: Tensor) -> Tensor:
        y: Tensor
        if len(x) <= self.rows:
            small = x.bfloat16().contiguous()  # the kernel takes no other rows
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(small, self.packed, self.group, self.scales_and_zeros)
        elif isinstance(self.kept, Bfloat16Linear):
            return self.kept.multiply(x)
        else:
            y = F.linear(x.to(self.wide), self.decoded(self.wide) if self.kept is None else self.kept)
        y = y.to(x.dtype)
        return y if self.bias is None else y.add_(self.bias)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """The matrix, decoded anew for every product."""
        matrix = torch.empty(self.out_features, self.in_features, dtype=dtype)
        half = self.in_features // 2
        matrix[:, :half].copy_((self.halves << 4) >> 4)  # an arithmetic shift restores the sign
        matrix[:, half:].copy_(self.halves >> 4)
        scale, zero = self.scales_and_zeros.transpose(0, 1).unbind(-1)  # (out, groups) each
        grouped = matrix.view(self.out_features, -1, self.group).mul_(scale[..., None])
        return (grouped.add_(zero[..., None]) if self.affine else grouped).view_as(matrix)
