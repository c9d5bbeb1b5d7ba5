"""Dependent quantization: a code means one of two values, by the parities of the codes above it in its column.

Eight states, two quantizers (ISO/IEC 15938-17): quantizer 0 has the even multiples of a step, quantizer 1 the odd ones
and zero, so that together they are packed as densely in many dimensions as one of half the step, at the bits of the
coarse one. The state starts anew every 256 rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from aicompress.weights.coding.packing import pack_rows, unpack_rows
from aicompress.weights.coding.quantizers import in_use
from aicompress.weights.coding.rows import RowStorage
from aicompress.weights.decoding import Meta, Tensors, decoder, unpack
from aicompress.weights.form import Symbols, Weight, require_dtype, require_real

BLOCK = 256  # rows after which the state starts anew


@dataclass(frozen=True)
class Trellis(Weight):
    """Codes of two quantizers: w = (2 k − q sgn k) s, where the codes above tell q.

    Attributes:
        codes: k, (out, in) int8.
        scale: s, (out, 1) floating.
    """

    form: ClassVar[str] = "trellis"
    codes: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])

    @classmethod
    def outline(cls, shape: tuple[int, int], dtype: torch.dtype) -> Trellis:
        """A weight of this form without data."""
        scale = torch.empty(shape[0], 1, dtype=dtype, device="meta")
        return cls(torch.empty(shape, dtype=torch.int8, device="meta"), scale)

    def tensors(self) -> dict[str, Tensor]:
        return {"": pack_rows(self.codes, 8, 128).reshape(-1), "scale": self.scale}

    def symbols(self) -> dict[str, Symbols]:
        return {"": Symbols("trellis", *self.shape)}

    def meta(self) -> dict[str, Any]:
        return {"form": self.form, "shape": list(self.shape)}

    def describe(self) -> str:
        return "two quantizers of 8 states"

    def dense(self) -> Tensor:
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> Tensor:
        first = start // BLOCK * BLOCK
        values = levels(self.codes[first:stop])[start - first :]
        return values if values.is_meta else values * self.scale[start:stop].float()

    def row_storage(self) -> RowStorage:
        return RowStorage.of(self.meta(), "", "scale", multiple=BLOCK)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Trellis:
        out, columns = meta["shape"]
        require_dtype("codes", tensors[""], torch.int32)
        require_real(scale=tensors["scale"])
        if tuple(tensors["scale"].shape) != (out, 1):
            raise ValueError(f"scales {list(tensors['scale'].shape)} of {out} rows")
        return cls(unpack_rows(tensors[""].reshape(out, -1), 8, columns, 128), tensors["scale"])


def levels(codes: Tensor) -> Tensor:
    """How many steps the codes (rows, columns) of whole blocks stand for, float32."""
    if codes.is_meta:
        return torch.empty(codes.shape, dtype=torch.float32, device="meta")
    return 2 * codes.float() - in_use(codes) * codes.sign()


@decoder("trellis")
def decode_trellis(meta: Meta, tensors: Tensors) -> Tensor:
    """w = (2 k − q sgn k) s."""
    out, columns = meta["shape"]
    codes = unpack(tensors[""].reshape(out, -1), 8, columns).float() - 128
    return ((2 * codes - in_use(codes) * codes.sign()) * tensors["scale"].float()).to(tensors["scale"].dtype)
