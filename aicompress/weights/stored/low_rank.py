"""W ≈ U V: two matrices, each in a stored form of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from aicompress.weights.coding.rows import StoredTensor
from aicompress.weights.decoding import Factors, Meta, Tensors, product
from aicompress.weights.form import Weight, nest, restore


@dataclass(frozen=True)
class LowRank(Weight):
    """A product of two factors.

    The primary tensor is U's. It cannot pass for the dense matrix: a rank below out*in/(out+in) is below both sides.

    Attributes:
        out: U, (out, rank).
        inner: V, (rank, in).
    """

    form: ClassVar[str] = "low_rank"
    prefixes: ClassVar[Mapping[str, str]] = {"out": "", "inner": "in"}
    out: Weight
    inner: Weight

    @property
    def shape(self) -> tuple[int, int]:
        return (self.out.shape[0], self.inner.shape[1])

    @property
    def rank(self) -> int:
        return self.inner.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        return {**self.out.tensors(), **nest("in", self.inner.tensors())}

    def meta(self) -> dict[str, Any]:
        return {"form": self.form, "rank": self.rank, "out": self.out.meta(), "in": self.inner.meta()}

    def dense(self) -> Tensor:
        left, right = self.out.dense(), self.inner.dense()
        if not left.is_meta:
            return left @ right
        if left.shape[1] != right.shape[0]:  # an outline: for arithmetic without data torch imports sympy
            raise ValueError(f"factors of {left.shape[1]} columns and {right.shape[0]} rows")
        return torch.empty(self.shape, dtype=torch.float32, device="meta")

    def rows(self, start: int, stop: int) -> Tensor:
        return self.out.rows(start, stop) @ self.inner.dense()

    def numbers(self) -> int:
        return self.out.numbers() + self.inner.numbers()

    def describe(self) -> str:
        factors = [self.out.describe(), self.inner.describe()]
        forms = f" ({' × '.join(words or 'dense' for words in factors)})" if any(factors) else ""
        return f"rank {self.rank}{forms}"

    def cut(self, axis: int, index: Tensor) -> LowRank | None:
        """U's rows or V's columns; None also where the factors would take more room than the dense matrix."""
        factor = (self.out if axis == 0 else self.inner).cut(axis, index)
        if factor is None:
            return None
        smaller = replace(self, out=factor) if axis == 0 else replace(self, inner=factor)
        out, columns = smaller.shape
        return smaller if self.rank * (out + columns) < out * columns else None

    def parts(self) -> dict[str, Weight]:
        return {"out": self.out, "in": self.inner}

    def with_parts(self, parts: Mapping[str, Weight]) -> LowRank:
        return LowRank(parts.get("out", self.out), parts.get("in", self.inner))

    def along_rows(self) -> tuple[Weight, ...]:
        return (self.out,)

    def read_rows(self, stored: Mapping[str, StoredTensor], rows: slice) -> LowRank:
        out, inner = self.of_part("out", stored), self.of_part("inner", stored)
        return LowRank(self.out.read_rows(out, rows), self.inner.read(inner))

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> LowRank:
        out, inner = cls.of_part("out", tensors), cls.of_part("inner", tensors)
        return cls(restore(out, meta["out"]), restore(inner, meta["in"]))


@product("low_rank")
def low_rank_factors(meta: Meta, tensors: Tensors) -> Factors:
    """U (out, rank) and V (rank, in)."""
    inner = {suffix: tensor for suffix, tensor in tensors.items() if suffix == "in" or suffix.startswith("in_")}
    outer = {suffix: tensor for suffix, tensor in tensors.items() if suffix not in inner}
    return [(meta["out"], outer), (meta["in"], {suffix[3:]: tensor for suffix, tensor in inner.items()})]
