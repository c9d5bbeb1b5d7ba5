"""A stored weight whose columns are multiplied by one factor each: w_ij = v_ij c_j."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from aicompress.weights.form import Weight, form_of


@dataclass(frozen=True)
class ColumnScaled(Weight):
    """V diag(c). The primary tensor is V's.

    Attributes:
        inner: V, in any form that cannot pass for the dense matrix.
        columns: c, (in,) floating.
    """

    form: ClassVar[str] = "column_scaled"
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

    def parameters(self) -> int:
        return self.inner.parameters()

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> ColumnScaled:
        inner = {suffix: tensor for suffix, tensor in tensors.items() if suffix != "columns"}
        return cls(form_of(meta["inner"]["form"]).restore(inner, meta["inner"]), tensors["columns"])
