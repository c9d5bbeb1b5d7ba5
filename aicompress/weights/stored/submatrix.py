"""Some rows and columns of a matrix; the others are zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from aicompress.weights.coding.rows import StoredTensor
from aicompress.weights.decoding import Kept, Meta, Tensors, decode, decoder, submatrix
from aicompress.weights.form import Weight, require_dtype, restore
from aicompress.weights.stored.dense import Dense


@dataclass(frozen=True)
class Submatrix(Weight):
    """Rows and columns that are not zero. The primary tensor is the block's, which is smaller than the matrix.

    Attributes:
        block: what stands where a kept row meets a kept column, in any form.
        size: shape of the matrix, (out, in).
        kept_rows: int32, ascending; None: all.
        kept_columns: int32, ascending; None: all. One of them is given, and leaves something out.
    """

    form: ClassVar[str] = "submatrix"
    prefixes: ClassVar[Mapping[str, str]] = {"block": ""}
    block: Weight
    size: tuple[int, int]
    kept_rows: Tensor | None = None
    kept_columns: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    def tensors(self) -> dict[str, Tensor]:
        kept = {"rows": self.kept_rows, "columns": self.kept_columns}
        return {**self.block.tensors(), **{suffix: index for suffix, index in kept.items() if index is not None}}

    def meta(self) -> dict[str, Any]:
        return {"form": self.form, "shape": list(self.size), "block": self.block.meta()}

    def dense(self) -> Tensor:
        block = self.block.dense()
        if block.is_meta:
            return torch.empty(self.size, dtype=torch.float32, device="meta")
        for axis, index in enumerate((self.kept_rows, self.kept_columns)):
            if index is not None:
                shape = [size if dim == axis else block.shape[dim] for dim, size in enumerate(self.size)]
                block = block.new_zeros(shape).index_copy_(axis, index.long(), block)
        return block

    def numbers(self) -> int:
        return self.block.numbers()

    def describe(self) -> str:
        block, (out, columns) = self.block.describe(), self.block.shape
        return ", ".join(filter(None, (f"{out} × {columns} kept", block)))

    def parts(self) -> dict[str, Weight]:
        return {"out": self.block}

    def with_parts(self, parts: Mapping[str, Weight]) -> Submatrix:
        return replace(self, block=parts.get("out", self.block))

    def before(self, part: str) -> Tensor | None:
        return None if self.kept_columns is None else _chosen(self.kept_columns, self.size[1])

    def behind(self, part: str) -> Tensor | None:
        return None if self.kept_rows is None else _chosen(self.kept_rows, self.size[0]).t()

    def along_rows(self) -> tuple[Weight, ...]:
        return (self.block,) if self.kept_rows is None else ()

    def row_multiple(self) -> int:
        return super().row_multiple() if self.kept_rows is None else int(self.block.row_multiple() == 1)

    def read_rows(self, stored: Mapping[str, StoredTensor], rows: slice) -> Submatrix:
        kept, own = None, rows
        if self.kept_rows is not None:
            places = stored["rows"].read(None)
            own = slice(*torch.searchsorted(places, torch.tensor([rows.start, rows.stop])).tolist())
            kept = places[own] - rows.start
        of_block = {s: t for s, t in stored.items() if s not in ("rows", "columns")}
        nothing = Dense(torch.zeros(0, self.block.shape[1]))
        block = nothing if own.start == own.stop else self.block.read_rows(of_block, own)
        columns = None if self.kept_columns is None else stored["columns"].read(None)
        return Submatrix(block, (rows.stop - rows.start, self.size[1]), kept, columns)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Submatrix:
        block = restore({s: t for s, t in tensors.items() if s not in ("rows", "columns")}, meta["block"])
        out, columns = (int(size) for size in meta["shape"])
        kept = (tensors.get("rows"), tensors.get("columns"))
        for name, index, size, own in zip(("rows", "columns"), kept, (out, columns), block.shape, strict=True):
            _require_index(name, index, size, own)
        if block.shape == (out, columns):
            raise ValueError("a submatrix that is the whole matrix")
        return cls(block, (out, columns), *kept)


def _chosen(index: Tensor, size: int) -> Tensor:
    """The matrix (kept, size) that takes these places of a vector."""
    return torch.eye(size, dtype=torch.float32)[index.long()]


def _require_index(name: str, index: Tensor | None, size: int, kept: int) -> None:
    """Refuse an index of another number of places than are kept, or of places that are not there.

    Raises:
        ValueError: it is one.
    """
    if index is not None:
        require_dtype(name, index, torch.int32)
    if (size if index is None else index.numel()) != kept:
        raise ValueError(f"{kept} {name} are stored, and another number is kept")
    if index is None or index.is_meta or not index.numel():
        return
    if not 0 <= int(index[0]) <= int(index[-1]) < size or bool((index.diff() <= 0).any()):
        raise ValueError(f"kept {name} are not ascending places among {size}")


@submatrix("submatrix")
def submatrix_kept(meta: Meta, tensors: Tensors) -> Kept:
    """The block, and the places of its rows and columns."""
    block = {suffix: tensor for suffix, tensor in tensors.items() if suffix not in ("rows", "columns")}
    return meta["block"], block, tensors.get("rows"), tensors.get("columns")


@decoder("submatrix")
def decode_submatrix(meta: Meta, tensors: Tensors) -> Tensor:
    """The block where kept rows meet kept columns, zeros elsewhere."""
    block = decode(meta["block"], {s: t for s, t in tensors.items() if s not in ("rows", "columns")})
    for axis, name in enumerate(("rows", "columns")):
        if name in tensors:
            size = list(block.shape)
            size[axis] = meta["shape"][axis]
            block = block.new_zeros(size).index_copy(axis, tensors[name].long(), block)
    return block
