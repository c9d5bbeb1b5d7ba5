"""A mask of one bit per element, or less where it is N:M, and the surviving values in row-major order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from aicompress.weights.coding.rows import RowStorage, StoredTensor
from aicompress.weights.decoding import Meta, Tensors, decoder, masked, require_kept
from aicompress.weights.form import Symbols, Weight, require_real
from aicompress.weights.grouping import Grouping
from aicompress.weights.stored.masked import Masked, mask_meta, mask_symbols, mask_tensors, restored_mask, rows_of_words

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Sparse(Masked):
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

    @classmethod
    def of(cls, matrix: Tensor, mask: Tensor, grouping: Grouping | None = None) -> Sparse:
        """Keep `matrix` where `mask` is True."""
        return cls(mask, matrix[mask], grouping)

    @classmethod
    def outline(cls, shape: tuple[int, int], kept: int, dtype: torch.dtype, grouping: Grouping | None = None) -> Sparse:
        """A weight of this form without data."""
        return cls(
            torch.empty(shape, dtype=torch.bool, device="meta"),
            torch.empty(kept, dtype=dtype, device="meta"),
            grouping,
        )

    def tensors(self) -> dict[str, Tensor]:
        return {**mask_tensors(self.mask, self.grouping), "values": self.values}

    def symbols(self) -> dict[str, Symbols]:
        return mask_symbols(self.mask, self.grouping)

    def meta(self) -> dict[str, Any]:
        return {"form": self.form, "shape": list(self.shape), **mask_meta(self.grouping)}

    def matrix(self) -> Tensor:
        """(out, in) in the values' own dtype, bit for bit."""
        integer = _INTEGERS[self.values.dtype.itemsize]  # scatter has no float8 kernel; all-zero bits are 0.0
        zeros = torch.zeros(self.shape, dtype=integer, device=self.values.device)
        return zeros.masked_scatter_(self.mask, self.values.view(integer)).view(self.values.dtype)

    def dense(self) -> Tensor:
        return self.matrix().float()

    def numbers(self) -> int:
        return self.values.numel()

    def describe(self) -> str:
        return self.zeros()

    def row_storage(self) -> RowStorage | None:
        """Of an N:M mask: as many survivors in every row."""
        multiple = rows_of_words(self.grouping)
        return RowStorage.of(self.meta(), "", "values", multiple=multiple) if multiple else None

    def read_rows(self, stored: Mapping[str, StoredTensor], rows: slice) -> Weight:
        if self.grouping is not None:
            return super().read_rows(stored, rows)
        mask, kept = self.read_mask(stored[""], rows)
        return Sparse(mask, stored["values"].read(kept))

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Sparse:
        values = tensors["values"]
        require_real(values=values)
        if values.ndim != 1:
            raise ValueError(f"values {list(values.shape)} of a sparse weight")
        mask, grouping = restored_mask(tensors, meta, values.numel())
        return cls(mask, values, grouping)


@decoder("sparse")
def decode_sparse(meta: Meta, tensors: Tensors) -> Tensor:
    """Values where the mask is set, zeros elsewhere."""
    out, columns = meta["shape"]
    kept, values = masked(meta, tensors), tensors["values"]
    require_kept(kept, values.numel())
    if values.dtype.itemsize == 1:  # scatter has no float8 kernel; all-zero bits are 0.0
        raw = torch.zeros(out * columns, dtype=torch.uint8, device=kept.device)
        return raw.masked_scatter(kept, values.view(torch.uint8)).view(values.dtype).reshape(out, columns)
    flat = torch.zeros(out * columns, dtype=values.dtype, device=kept.device)
    return flat.masked_scatter(kept, values).reshape(out, columns)
