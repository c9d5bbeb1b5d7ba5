"""A mask of one bit per element, or less where it is N:M, and the surviving values in row-major order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from aicompress.weights.form import Weight
from aicompress.weights.grouping import Grouping, mask_meta, mask_tensors, restored_mask

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Sparse(Weight):
    """Survivors of a mask, bit-exact.

    Attributes:
        mask: (out, in) bool, True where a value is kept.
        values: (kept,) floating, in the order of the mask's True elements.
        grouping: N and M where the mask is N:M and packed as such.
    """

    form: ClassVar[str] = "sparse"
    mask: Tensor
    values: Tensor
    grouping: Grouping | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return (self.mask.shape[0], self.mask.shape[1])

    @classmethod
    def of(cls, matrix: Tensor, mask: Tensor, grouping: Grouping | None = None) -> Sparse:
        """Keep `matrix` where `mask` is True."""
        return cls(mask, matrix[mask], grouping)

    @classmethod
    def outline(cls, shape: tuple[int, int], kept: int, dtype: torch.dtype, grouping: Grouping | None = None) -> Sparse:
        return cls(
            torch.empty(shape, dtype=torch.bool, device="meta"),
            torch.empty(kept, dtype=dtype, device="meta"),
            grouping,
        )

    def tensors(self) -> dict[str, Tensor]:
        return {**mask_tensors(self.mask, self.grouping), "values": self.values}

    def meta(self) -> dict[str, Any]:
        return {"form": self.form, "shape": list(self.shape), **mask_meta(self.grouping)}

    def matrix(self) -> Tensor:
        """(out, in) in the values' own dtype, bit for bit."""
        integer = _INTEGERS[self.values.dtype.itemsize]  # scatter has no float8 kernel; all-zero bits are 0.0
        zeros = torch.zeros(self.shape, dtype=integer, device=self.values.device)
        return zeros.masked_scatter_(self.mask, self.values.view(integer)).view(self.values.dtype)

    def dense(self) -> Tensor:
        return self.matrix().float()

    def parameters(self) -> int:
        return self.values.numel()

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Sparse:
        mask, grouping = restored_mask(tensors, meta)
        return cls(mask, tensors["values"], grouping)
