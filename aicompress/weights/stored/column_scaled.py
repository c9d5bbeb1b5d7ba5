"""A stored weight whose columns are multiplied by one factor each: w_ij = v_ij c_j."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from aicompress.weights.coding.rows import StoredTensor
from aicompress.weights.decoding import Meta, Tensors, decode, decoder
from aicompress.weights.form import Weight, require_real, restore


@dataclass(frozen=True)
class ColumnScaled(Weight):
    """V diag(c). The primary tensor is V's.

    Attributes:
        inner: V, in any form that cannot pass for the dense matrix.
        columns: c, (in,) floating.
    """

    form: ClassVar[str] = "column_scaled"
    prefixes: ClassVar[Mapping[str, str]] = {"inner": ""}
    scales: ClassVar[frozenset[str]] = frozenset({"columns"})
    inner: Weight
    columns: Tensor

    @classmethod
    def outline(cls, inner: Weight, dtype: torch.dtype) -> ColumnScaled:
        """A weight of this form without data."""
        return cls(inner, torch.empty(inner.shape[1], dtype=dtype, device="meta"))

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def tensors(self) -> dict[str, Tensor]:
        return {**self.inner.tensors(), "columns": self.columns}

    def meta(self) -> dict[str, Any]:
        return {"form": self.form, "inner": self.inner.meta()}

    def dense(self) -> Tensor:
        return self.inner.dense() * self.columns.float()

    def rows(self, start: int, stop: int) -> Tensor:
        return self.inner.rows(start, stop) * self.columns.float()

    def numbers(self) -> int:
        return self.inner.numbers()

    def describe(self) -> str:
        return ", ".join(piece for piece in (self.inner.describe(), "column factors") if piece)

    def along_rows(self) -> tuple[Weight, ...]:
        return (self.inner,)

    def read_rows(self, stored: Mapping[str, StoredTensor], rows: slice) -> ColumnScaled:
        inner = {suffix: tensor for suffix, tensor in stored.items() if suffix != "columns"}
        return ColumnScaled(self.inner.read_rows(inner, rows), stored["columns"].read(None))

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> ColumnScaled:
        inner = {suffix: tensor for suffix, tensor in tensors.items() if suffix != "columns"}
        weight, columns = restore(inner, meta["inner"]), tensors["columns"]
        require_real(columns=columns)
        if columns.shape != weight.shape[1:]:
            raise ValueError(f"factors {list(columns.shape)} of {weight.shape[1]} columns")
        return cls(weight, columns)


@decoder("column_scaled")
def decode_column_scaled(meta: Meta, tensors: Tensors) -> Tensor:
    """w_ij = v_ij c_j."""
    return decode(meta["inner"], tensors) * tensors["columns"]
