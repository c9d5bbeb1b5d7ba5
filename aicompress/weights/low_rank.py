"""W ≈ U V: two matrices, each in a stored form of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from aicompress.weights.form import Weight, form_of, nest, unnest


@dataclass(frozen=True)
class LowRank(Weight):
    """A product of two factors.

    The primary tensor is U's. It cannot pass for the dense matrix: a rank below out*in/(out+in) is below both sides.

    Attributes:
        out: U, (out, rank).
        inner: V, (rank, in).
    """

    form: ClassVar[str] = "low_rank"
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
        return self.out.dense() @ self.inner.dense()

    def rows(self, start: int, stop: int) -> Tensor:
        return self.out.rows(start, stop) @ self.inner.dense()

    def parameters(self) -> int:
        return self.out.parameters() + self.inner.parameters()

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> LowRank:
        inner = unnest("in", tensors)
        out = {key: t for key, t in tensors.items() if key != "in" and not key.startswith("in_")}
        return cls(
            form_of(meta["out"]["form"]).restore(out, meta["out"]),
            form_of(meta["in"]["form"]).restore(inner, meta["in"]),
        )
