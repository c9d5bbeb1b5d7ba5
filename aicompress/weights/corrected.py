"""A stored weight plus a low-rank correction of its error: W ≈ B + U V."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from aicompress.weights.form import Weight, form_of, nest, unnest
from aicompress.weights.low_rank import LowRank

_PREFIX = "correction"


@dataclass(frozen=True)
class Corrected(Weight):
    """B + U V. The primary tensor is B's.

    Attributes:
        base: B, in any form that cannot pass for the dense matrix.
        correction: U V.
    """

    form: ClassVar[str] = "corrected"
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

    def parameters(self) -> int:
        return self.base.parameters() + self.correction.parameters()

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Corrected:
        own = {suffix: tensor for suffix, tensor in tensors.items() if not suffix.startswith(_PREFIX)}
        base = form_of(meta["base"]["form"]).restore(own, meta["base"])
        return cls(base, LowRank.restore(unnest(_PREFIX, tensors), meta[_PREFIX]))
