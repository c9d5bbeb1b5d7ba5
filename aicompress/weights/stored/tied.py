"""The weight of another parameter: W = W', stored there and named here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from aicompress.weights.coding.rows import StoredTensor
from aicompress.weights.decoding import Factors, Meta, Tensors, factors, product
from aicompress.weights.form import Weight, nest, require_dtype, restore, unnest
from aicompress.weights.stored.dense import Dense

_PREFIX = "source"


def _marker() -> Tensor:
    return torch.zeros(1, dtype=torch.uint8)


@dataclass(frozen=True)
class Tied(Weight):
    """Another parameter's weight.

    The primary tensor is one byte of no meaning: with one axis it cannot pass for a matrix. The tensors of the source
    follow under a prefix; in a checkpoint they lie under the other parameter's name.

    Attributes:
        source: the other parameter's weight, (out, in).
        view: shape of the other parameter where it is no matrix, such as a convolution's; empty elsewhere.
        transposed: the other parameter is (in, out).
    """

    form: ClassVar[str] = "tied"
    prefixes: ClassVar[Mapping[str, str]] = {"source": _PREFIX}
    aliases: ClassVar[bool] = True
    source: Weight
    view: tuple[int, ...] = ()
    transposed: bool = False
    marker: Tensor = field(default_factory=_marker)

    @property
    def shape(self) -> tuple[int, int]:
        return self.source.shape

    def tensors(self) -> dict[str, Tensor]:
        return {"": self.marker, **nest(_PREFIX, self._source_tensors())}

    def _source_tensors(self) -> dict[str, Tensor]:
        """Tensors of the source as the other parameter has them."""
        if not isinstance(self.source, Dense):
            return self.source.tensors()
        matrix = self.source.matrix.t() if self.transposed else self.source.matrix
        return {"": matrix.reshape(self.view) if self.view else matrix}

    def meta(self) -> dict[str, Any]:
        plain: dict[str, Any] = {"form": self.form, _PREFIX: self.source.meta()}
        plain |= {"view": list(self.view)} if self.view else {}
        return {**plain, "transposed": True} if self.transposed else plain

    def dense(self) -> Tensor:
        return self.source.dense()

    def rows(self, start: int, stop: int) -> Tensor:
        return self.source.rows(start, stop)

    def numbers(self) -> int:
        return self.source.numbers()

    def describe(self) -> str:
        return self.source.describe()

    def cut(self, axis: int, index: Tensor) -> Tied | None:
        """The same with rows or columns of the source, which are nobody else's; None of a plain one."""
        part = None if isinstance(self.source, Dense) else self.source.cut(axis, index)
        return None if part is None else Tied(part)

    def along_rows(self) -> tuple[Weight, ...]:
        return (self.source,)

    def read_rows(self, stored: Mapping[str, StoredTensor], rows: slice) -> Tied:
        its = unnest(_PREFIX, stored)
        if isinstance(self.source, Dense):
            part = its[""].read(rows, int(self.transposed))
            matrix = part.t() if self.transposed else part.flatten(1)
            return Tied.of(Dense(matrix), tuple(part.shape), self.transposed)
        return Tied(self.source.read_rows(its, rows))

    def borrowed(self, part: str) -> dict[str, str]:
        return {suffix: suffix[len(_PREFIX) + 1 :] for suffix in nest(_PREFIX, self._source_tensors())}

    def borrowing(self, part: str, owner: Weight) -> Tied:
        return replace(self, source=owner)

    @classmethod
    def of(cls, source: Weight, shape: tuple[int, ...], transposed: bool) -> Tied:
        """The weight of a parameter.

        Args:
            source: it as a matrix (out, in).
            shape: of the parameter.
            transposed: it stores (in, out).
        """
        return cls(source, shape if len(shape) != 2 else (), transposed)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Tied:
        require_dtype("the mark of another parameter's weight", tensors[""], torch.uint8)
        if tensors[""].shape != (1,):
            raise ValueError("another parameter's weight is marked by one byte")
        its, view, transposed = unnest(_PREFIX, tensors), tuple(meta.get("view", ())), bool(meta.get("transposed"))
        if meta[_PREFIX]["form"] == Dense.form:
            if view and tuple(its[""].shape) != view:
                raise ValueError(f"a parameter {list(its[''].shape)} is named as one {list(view)}")
            its[""] = its[""].t() if transposed else its[""].reshape(len(its[""]), -1)
        return cls(restore(its, meta[_PREFIX]), view, transposed, tensors[""])


@product("tied")
def tied_factors(meta: Meta, tensors: Tensors) -> Factors:
    """The factors of the other parameter, or its matrix (out, in)."""
    source = {suffix[7:]: tensor for suffix, tensor in tensors.items() if suffix.startswith("source")}
    if meta["source"]["form"] == "dense":
        whole = source[""]
        source = {"": whole.t() if meta.get("transposed") else whole.reshape(len(whole), -1)}
    return factors(meta["source"], source)
