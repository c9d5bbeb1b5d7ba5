"""A plain matrix in the parameter's own dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from aicompress.weights.coding.rows import RowStorage
from aicompress.weights.decoding import Meta, Tensors, decoder
from aicompress.weights.form import Weight, require_real


@dataclass(frozen=True)
class Dense(Weight):
    """The matrix itself.

    Attributes:
        matrix: (out, in), any floating dtype.
    """

    form: ClassVar[str] = "dense"
    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return (self.matrix.shape[0], self.matrix.shape[1])

    @classmethod
    def outline(cls, shape: tuple[int, int], dtype: torch.dtype) -> Dense:
        """A matrix without data."""
        return cls(torch.empty(shape, dtype=dtype, device="meta"))

    def tensors(self) -> dict[str, Tensor]:
        return {"": self.matrix}

    def meta(self) -> dict[str, Any]:
        return {"form": self.form}

    def dense(self) -> Tensor:
        return self.matrix.float()

    def rows(self, start: int, stop: int) -> Tensor:
        return self.matrix[start:stop].to(torch.float32, copy=True)

    def cut(self, axis: int, index: Tensor) -> Dense:
        return Dense(self.matrix.index_select(axis, index))

    def row_storage(self) -> RowStorage:
        return RowStorage(frozenset({""}), lambda rows: self.meta())

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Dense:
        require_real(matrix=tensors[""])
        return cls(tensors[""])


@decoder("dense")
def decode_dense(meta: Meta, tensors: Tensors) -> Tensor:
    """The matrix itself."""
    return tensors[""]
