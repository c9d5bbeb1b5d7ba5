"""A mask of one bit per element and the surviving values in row-major order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from aicompress.weights.form import Weight
from aicompress.weights.packing import pack_mask, unpack_mask


@dataclass(frozen=True)
class Sparse(Weight):
    """Survivors of a mask, bit-exact.

    Attributes:
        mask: (out, in) bool, True where a value is kept.
        values: (kept,) floating, in the order of the mask's True elements.
    """

    form: ClassVar[str] = "sparse"
    mask: Tensor
    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return (self.mask.shape[0], self.mask.shape[1])

    @classmethod
    def of(cls, matrix: Tensor, mask: Tensor) -> Sparse:
        """Keep `matrix` where `mask` is True."""
        return cls(mask, matrix[mask])

    @classmethod
    def outline(cls, shape: tuple[int, int], kept: int, dtype: torch.dtype) -> Sparse:
        return cls(
            torch.empty(shape, dtype=torch.bool, device="meta"),
            torch.empty(kept, dtype=dtype, device="meta"),
        )

    def tensors(self) -> dict[str, Tensor]:
        return {"": pack_mask(self.mask.reshape(-1)), "values": self.values}

    def meta(self) -> dict[str, Any]:
        return {"form": self.form, "shape": list(self.shape)}

    def dense(self) -> Tensor:
        dense = torch.zeros(self.shape, dtype=torch.float32)
        dense[self.mask] = self.values.float()
        return dense

    def parameters(self) -> int:
        return self.values.numel()

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Sparse:
        out, columns = meta["shape"]
        return cls(unpack_mask(tensors[""], out * columns).reshape(out, columns), tensors["values"])
