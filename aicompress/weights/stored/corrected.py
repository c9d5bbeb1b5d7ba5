"""A stored weight plus a low-rank correction of its error: W ≈ B + U V."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from aicompress.weights.coding.rows import StoredTensor
from aicompress.weights.decoding import Meta, Tensors, decode, decoder
from aicompress.weights.form import Weight, nest, restore
from aicompress.weights.stored.low_rank import LowRank

_PREFIX = "correction"


def correction_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of a correction's factors, which are stored in 16 bits: the layer's own, or float16."""
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16


@dataclass(frozen=True)
class Corrected(Weight):
    """B + U V. The primary tensor is B's.

    Attributes:
        base: B, in any form that cannot pass for the dense matrix.
        correction: U V.
    """

    form: ClassVar[str] = "corrected"
    prefixes: ClassVar[Mapping[str, str]] = {"base": "", "correction": _PREFIX}
    base: Weight
    correction: LowRank

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    def tensors(self) -> dict[str, Tensor]:
        return {**self.base.tensors(), **nest(_PREFIX, self.correction.tensors())}

    def meta(self) -> dict[str, Any]:
        return {"form": self.form, "base": self.base.meta(), _PREFIX: self.correction.meta()}

    def dense(self) -> Tensor:
        return self.base.dense() + self.correction.dense()

    def rows(self, start: int, stop: int) -> Tensor:
        return self.base.rows(start, stop) + self.correction.rows(start, stop)

    def numbers(self) -> int:
        return self.base.numbers() + self.correction.numbers()

    def describe(self) -> str:
        pieces = (self.base.describe(), f"corrected at {self.correction.describe()}")
        return ", ".join(piece for piece in pieces if piece)

    def along_rows(self) -> tuple[Weight, ...]:
        return (self.base, self.correction)

    def read_rows(self, stored: Mapping[str, StoredTensor], rows: slice) -> Corrected:
        base, correction = self.of_part("base", stored), self.of_part("correction", stored)
        return Corrected(self.base.read_rows(base, rows), self.correction.read_rows(correction, rows))

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Corrected:
        base, correction = cls.of_part("base", tensors), cls.of_part("correction", tensors)
        weight = cls(restore(base, meta["base"]), LowRank.restore(correction, meta[_PREFIX]))
        if weight.base.shape != weight.correction.shape:
            raise ValueError(f"a correction {weight.correction.shape} of a weight {weight.base.shape}")
        return weight


@decoder("corrected")
def decode_corrected(meta: Meta, tensors: Tensors) -> Tensor:
    """W = B + U V."""
    correction = {suffix[11:]: tensor for suffix, tensor in tensors.items() if suffix.startswith("correction")}
    return decode(meta["base"], tensors) + decode(meta["correction"], correction)
