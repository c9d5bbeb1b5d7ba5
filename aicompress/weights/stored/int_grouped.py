"""Integer codes with one scale per tensor, row or group of a row: w = (q - zero) * scale."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from aicompress.weights.coding.packing import pack_rows, require_bits, unpack_rows
from aicompress.weights.coding.rows import RowStorage
from aicompress.weights.decoding import Meta, Tensors, by_column, decoder, unpack
from aicompress.weights.form import Symbols, Weight, require_dtype, require_real

PIECE = 1 << 20  # codes decoded at a time
LARGEST_INPUT = 16  # bits that inputs are rounded to


def groups_of(columns: int, group_size: int) -> int:
    """How many groups a row has; the last one is narrower where the size does not divide the columns."""
    return -(-columns // (group_size or columns))


def spread(values: Tensor, columns: int, group_size: int) -> Tensor:
    """(rows, groups) -> (rows, columns): each column has the value of its group.

    Raises:
        ValueError: there is not one value for each group.
    """
    if values.shape[1] != groups_of(columns, group_size):
        raise ValueError(f"{values.shape[1]} groups of {group_size} in {columns} columns")
    return values.repeat_interleave(group_size or columns, dim=1)[:, :columns]


def require_groups(scale: Tensor, zero: Tensor | None, rows: int, groups: int) -> None:
    """Refuse scales and zero points that are not one for each group of each row, or one for all.

    Raises:
        ValueError: they are others, or of a dtype that holds no such numbers.
    """
    require_real(scale=scale)
    if zero is not None and not zero.is_floating_point():
        require_dtype("zero", zero, torch.int8)
    if tuple(scale.shape) not in ((rows, groups), (1, 1)) or (zero is not None and zero.shape != scale.shape):
        raise ValueError(f"scales {list(scale.shape)} for {rows} rows of {groups} groups")


def code_words(bits: int, group_size: int, symmetric: bool) -> list[str]:
    """The settings of uniform codes in words."""
    groups = [f"groups of {group_size}"] if group_size else []
    return [f"{bits}-bit", *groups, *([] if symmetric else ["asymmetric"])]


class Coded(Weight):
    """A form of uniform affine codes, of all elements or of some."""

    @abstractmethod
    def grouped(self) -> IntGrouped:
        """The same weight with a code for every element; of an outline, an outline."""


@dataclass(frozen=True)
class IntGrouped(Coded):
    """Uniform affine codes.

    Attributes:
        codes: (out, in) int8, in [-2^(bits-1), 2^(bits-1)-1].
        scale: (out, groups) floating; groups is 1 for one scale per row. A tensor-wide scale is (1, 1).
        zero: (out, groups) int8, floating where zero points are real numbers, or None for symmetric codes.
        bits: 1 to 8.
        group_size: columns that share a scale, or 0 for one scale per row or per tensor. Where it does not divide the
            columns, the last group is narrower.
        activation_bits: the running layer also quantizes its input to this many bits, per token; None leaves it alone.
        stream: the packed codes, where they are made already; a weight with other codes has none.
    """

    form: ClassVar[str] = "int_grouped"
    scales: ClassVar[frozenset[str]] = frozenset({"scale", "zero"})
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group_size: int = 0
    activation_bits: int | None = None
    stream: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_bits(self.bits)
        require_dtype("codes", self.codes, torch.int8)
        if self.group_size < 0 or not 1 <= (self.activation_bits or 1) <= LARGEST_INPUT:
            raise ValueError(f"groups of {self.group_size:.6g}, inputs of {self.activation_bits or 0:.6g} bits")

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])

    @property
    def symmetric(self) -> bool:
        return self.zero is None

    @property
    def even(self) -> bool:
        """Whether all groups are of one size."""
        return not self.group_size or self.shape[1] % self.group_size == 0

    @classmethod
    def outline(
        cls,
        shape: tuple[int, int],
        scale: tuple[torch.dtype, tuple[int, int]],
        symmetric: bool,
        bits: int,
        group_size: int,
        activation_bits: int | None = None,
    ) -> IntGrouped:
        """A weight of this form without data; `scale` gives the scales' dtype and shape."""
        return cls(
            torch.empty(shape, dtype=torch.int8, device="meta"),
            torch.empty(scale[1], dtype=scale[0], device="meta"),
            None if symmetric else torch.empty(scale[1], dtype=torch.int8, device="meta"),
            bits,
            group_size,
            activation_bits,
        )

    def grouped(self) -> IntGrouped:
        return self

    def packed(self) -> Tensor:
        """(out, words) int32 bit stream of the codes, shifted to unsigned."""
        return pack_rows(self.codes, self.bits, 1 << (self.bits - 1)) if self.stream is None else self.stream

    def with_stream(self, stream: Tensor | None) -> Self:
        """The same weight, whose packed codes are made already."""
        known = replace(self)
        object.__setattr__(known, "stream", stream)
        return known

    def tensors(self) -> dict[str, Tensor]:
        # One-dimensional, so that it can never have the shape of a dense matrix, not even (out, 1).
        stored = {"": self.packed().reshape(-1), "scale": self.scale}
        return stored if self.zero is None else {**stored, "zero": self.zero}

    def symbols(self) -> dict[str, Symbols]:
        zero = None if self.zero is None or self.zero.is_floating_point() else self.zero
        shifted = {} if zero is None else {"zero": Symbols("int8", zero.shape[0], zero.shape[1])}
        return {"": Symbols(self.bits, *self.shape), **shifted}

    def meta(self) -> dict[str, Any]:
        meta: dict[str, Any] = {
            "form": self.form,
            "bits": self.bits,
            "group_size": self.group_size,
            "shape": list(self.shape),
            "symmetric": self.symmetric,
        }
        if self.activation_bits is not None:
            meta["activation_bits"] = self.activation_bits
        return meta

    def describe(self) -> str:
        rounded = [f"{self.activation_bits}-bit activations"] if self.activation_bits else []
        return ", ".join(code_words(self.bits, self.group_size, self.symmetric) + rounded)

    def cut(self, axis: int, index: Tensor) -> IntGrouped | None:
        """None for columns of groups that share a scale."""
        codes = self.codes.index_select(axis, index)
        if axis == 1:
            return replace(self, codes=codes) if self.group_size == 0 else None
        if self.scale.shape[0] == 1:  # one scale for the whole tensor
            return replace(self, codes=codes)
        zero = self.zero.index_select(0, index) if self.zero is not None else None
        return replace(self, codes=codes, scale=self.scale.index_select(0, index), zero=zero)

    def dense(self) -> Tensor:
        dense = torch.empty(self.shape, dtype=torch.float32, device=self.codes.device)
        step = max(1, PIECE // max(1, self.shape[1]))  # rows that stay in cache
        for start in range(0, self.shape[0], step):
            self._decode(start, start + step, dense[start : start + step])
        return dense

    def rows(self, start: int, stop: int) -> Tensor:
        size = (len(range(*slice(start, stop).indices(self.shape[0]))), self.shape[1])
        return self._decode(start, stop, torch.empty(size, dtype=torch.float32, device=self.codes.device))

    def _decode(self, start: int, stop: int, out: Tensor) -> Tensor:
        rows = slice(0, 1) if self.scale.shape[0] == 1 else slice(start, stop)  # a tensor-wide scale has one row
        out.copy_(self.codes[start:stop])
        scale, zero = self.scale[rows].float(), None if self.zero is None else self.zero[rows]
        if self.even:
            codes = out.view(out.shape[0], self.scale.shape[1], -1)
            scale, zero = scale[:, :, None], None if zero is None else zero[:, :, None]
        else:
            codes, columns, size = out, self.shape[1], self.group_size
            scale, zero = spread(scale, columns, size), None if zero is None else spread(zero, columns, size)
        if out.is_meta:  # an outline: shapes are checked; for arithmetic without data torch imports sympy
            scale.expand(codes.shape)
            if zero is not None:
                zero.expand(codes.shape)
            return out
        if zero is not None:
            codes.sub_(zero)
        codes.mul_(scale)
        return out

    def row_storage(self) -> RowStorage:
        return RowStorage.of(self.meta(), "", "scale", "zero")

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> IntGrouped:
        out, columns = meta["shape"]
        scale, zero = tensors["scale"], tensors.get("zero")
        require_groups(scale, zero, out, groups_of(columns, int(meta["group_size"])))
        return cls.from_packed(tensors[""].reshape(out, -1), scale, zero, meta)

    @classmethod
    def from_packed(cls, packed: Tensor, scale: Tensor, zero: Tensor | None, meta: Mapping[str, Any]) -> IntGrouped:
        """Build from the int32 bit stream (out, words)."""
        bits = require_bits(int(meta["bits"]))
        require_dtype("codes", packed, torch.int32)
        codes = unpack_rows(packed, bits, int(meta["shape"][1]), 1 << (bits - 1))
        return cls(codes, scale, zero, bits, int(meta["group_size"]), meta.get("activation_bits"))


@decoder("int_grouped")
def decode_int_grouped(meta: Meta, tensors: Tensors) -> Tensor:
    """w = (q - zero) * scale, computed in float32."""
    out, columns = meta["shape"]
    bits, scale, zero = int(meta["bits"]), tensors["scale"], tensors.get("zero")
    codes = unpack(tensors[""].reshape(out, -1), bits, columns).float() - (1 << (bits - 1))
    size = int(meta["group_size"])
    if zero is not None:
        codes = codes - by_column(zero.float(), columns, size)
    return (codes * by_column(scale.float(), columns, size)).to(scale.dtype)
