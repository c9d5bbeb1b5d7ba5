"""W ≈ B + U V: a matrix that several layers have in common, and a low-rank difference of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from aicompress.weights.coding.rows import StoredTensor
from aicompress.weights.decoding import Meta, Tensors, decode, decoder
from aicompress.weights.form import Weight, nest, restore


@dataclass(frozen=True)
class BaseDelta(Weight):
    """A matrix and a product of two factors.

    The primary tensor is U's, as of a low-rank weight: B has the dense shape, and cannot be it.

    Attributes:
        out: U, (out, rank).
        inner: V, (rank, in).
        base: B, (out, in).
    """

    form: ClassVar[str] = "base_delta"
    prefixes: ClassVar[Mapping[str, str]] = {"out": "", "inner": "in", "base": "base"}
    out: Weight
    inner: Weight
    base: Weight

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def rank(self) -> int:
        return self.inner.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        return {**self.out.tensors(), **nest("in", self.inner.tensors()), **nest("base", self.base.tensors())}

    def meta(self) -> dict[str, Any]:
        parts = {name: part.meta() for name, part in self.parts().items()}
        return {"form": self.form, "rank": self.rank, **parts}

    def dense(self) -> Tensor:
        left, right, base = self.out.dense(), self.inner.dense(), self.base.dense()
        if (left.shape[0], right.shape[1]) != self.shape or left.shape[1] != right.shape[0]:
            raise ValueError(f"factors {list(left.shape)} and {list(right.shape)} beside a matrix {list(self.shape)}")
        return base if base.is_meta else torch.addmm(base, left, right)

    def rows(self, start: int, stop: int) -> Tensor:
        return torch.addmm(self.base.rows(start, stop), self.out.rows(start, stop), self.inner.dense())

    def numbers(self) -> int:
        return sum(part.numbers() for part in self.parts().values())

    def describe(self) -> str:
        words = [part.describe() for part in self.parts().values()]
        forms = f" ({' · '.join(each or 'dense' for each in words)})" if any(words) else ""
        return f"rank {self.rank} beside a base{forms}"

    def cut(self, axis: int, index: Tensor) -> BaseDelta | None:
        """U's rows or V's columns, and the base's."""
        factor = (self.out if axis == 0 else self.inner).cut(axis, index)
        base = self.base.cut(axis, index)
        if factor is None or base is None:
            return None
        smaller = BaseDelta(factor, self.inner, base) if axis == 0 else BaseDelta(self.out, factor, base)
        return smaller if self.rank < base.shape[1] else None  # else U could pass for the dense matrix

    def parts(self) -> dict[str, Weight]:
        """Both factors and the base, which is given the layer's input as V is."""
        return {"out": self.out, "base": self.base, "in": self.inner}

    def with_parts(self, parts: Mapping[str, Weight]) -> BaseDelta:
        return BaseDelta(parts.get("out", self.out), parts.get("in", self.inner), parts.get("base", self.base))

    def along_rows(self) -> tuple[Weight, ...]:
        return (self.out, self.base)

    def read_rows(self, stored: Mapping[str, StoredTensor], rows: slice) -> BaseDelta:
        out, inner, base = (self.of_part(name, stored) for name in self.prefixes)
        return BaseDelta(self.out.read_rows(out, rows), self.inner.read(inner), self.base.read_rows(base, rows))

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> BaseDelta:
        out, inner, base = (cls.of_part(name, tensors) for name in cls.prefixes)
        return cls(restore(out, meta["out"]), restore(inner, meta["in"]), restore(base, meta["base"]))


@decoder("base_delta")
def decode_base_delta(meta: Meta, tensors: Tensors) -> Tensor:
    """W = B + U V."""
    inner = {suffix[3:]: tensor for suffix, tensor in tensors.items() if suffix.partition("_")[0] == "in"}
    base = {suffix[5:]: tensor for suffix, tensor in tensors.items() if suffix.partition("_")[0] == "base"}
    outer = {suffix: tensor for suffix, tensor in tensors.items() if suffix.partition("_")[0] not in ("in", "base")}
    return decode(meta["base"], base) + decode(meta["out"], outer) @ decode(meta["in"], inner)
