"""Numbers of eight bits with a sign and an exponent, and one scale per tensor, row, group or block: w = v * scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from aicompress.weights.coding.rows import RowStorage
from aicompress.weights.decoding import Meta, Tensors, by_column, decoder
from aicompress.weights.form import Symbols, Weight

PIECE = 1 << 18  # values decoded at a time: they stay in a core's own cache
DTYPES = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
FIRST_INFINITE = {"float8_e4m3fn": 0x7F, "float8_e5m2": 0x7C}  # the first byte, but for its sign, that is no number


@dataclass(frozen=True)
class Float8(Weight):
    """Float8 values in blocks that share a scale.

    Attributes:
        values: (out, in) of a float8 dtype.
        scale: (rows of blocks, columns of blocks) floating.
        block: rows and columns that share a scale, 0 for all of them; the last blocks may be smaller.
    """

    form: ClassVar[str] = "float8"
    scales: ClassVar[frozenset[str]] = frozenset({"scale"})
    values: Tensor
    scale: Tensor
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        return (self.values.shape[0], self.values.shape[1])

    @classmethod
    def outline(
        cls,
        shape: tuple[int, int],
        dtype: torch.dtype,
        scale: tuple[torch.dtype, tuple[int, int]],
        block: tuple[int, int],
    ) -> Float8:
        """A weight of this form without data; `scale` gives the scales' dtype and shape."""
        empty = torch.empty(scale[1], dtype=scale[0], device="meta")
        return cls(torch.empty(shape, dtype=dtype, device="meta"), empty, block)

    def tensors(self) -> dict[str, Tensor]:
        # One-dimensional, so that it can never have the shape of a dense matrix; bytes, so that no reader casts them.
        return {"": self.values.contiguous().view(torch.uint8).reshape(-1), "scale": self.scale}

    def symbols(self) -> dict[str, Symbols]:
        return {"": Symbols("bytes", *self.shape)}

    def meta(self) -> dict[str, Any]:
        dtype = str(self.values.dtype).removeprefix("torch.")
        return {"form": self.form, "dtype": dtype, "block": list(self.block), "shape": list(self.shape)}

    def describe(self) -> str:
        rows, columns = self.block
        if not rows:
            return "one scale" if not columns else f"groups of {columns} columns"
        if rows == 1:
            return f"groups of {columns}" if columns else "a scale per row"
        return f"blocks of {rows} × {columns or self.shape[1]}"

    def cut(self, axis: int, index: Tensor) -> Float8 | None:
        """None where what stays would share its scales in blocks of other sizes."""
        if self.block[axis] > 1:
            return None
        scale = self.scale.index_select(axis, index) if self.block[axis] == 1 else self.scale
        return replace(self, values=_bytes(self.values).index_select(axis, index).view(self.values.dtype), scale=scale)

    def dense(self) -> Tensor:
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> Tensor:
        columns, width = self.shape[1], self.block[1]
        dense = torch.empty(self.values[start:stop].shape, dtype=torch.float32, device=self.values.device)
        if dense.is_meta:  # an outline: for arithmetic without data torch imports sympy
            return dense
        own = torch.arange(start, start + len(dense), device=self.scale.device) // (self.block[0] or self.shape[0] or 1)
        step = max(1, PIECE // max(1, columns))
        for first in range(0, len(dense), step):
            part, scale = dense[first : first + step], self.scale.float()[own[first : first + step]]
            part.copy_(numbers(self.values[start + first : start + first + len(part)]))
            if width and columns % width == 0:
                part.view(len(part), -1, width).mul_(scale[:, :, None])
            else:
                part.mul_(by_column(scale, columns, width))
        return dense

    def row_storage(self) -> RowStorage:
        (height, width), meta = self.block, self.meta()

        def of_rows(rows: int) -> dict[str, Any]:
            return {**meta, "shape": [rows, self.shape[1]], "block": [min(height, rows), width]}

        return RowStorage(frozenset({"", "scale"}), of_rows, max(1, height))

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Float8:
        (out, columns), (height, width) = meta["shape"], meta["block"]
        values, scale = tensors[""].reshape(out, columns), tensors["scale"]
        grid = (-(-out // (height or out or 1)), -(-columns // (width or columns or 1)))
        if tuple(scale.shape) != grid or not 0 <= height <= out or not 0 <= width <= columns:
            raise ValueError(f"scales {list(scale.shape)} for {grid[0]} × {grid[1]} blocks")
        if values.dtype is not torch.uint8 or not scale.is_floating_point():
            raise ValueError(f"values {values.dtype} and scales {scale.dtype}")
        values = values.view(DTYPES[meta["dtype"]])
        require_numbers(values)
        return cls(values, scale, (height, width))


def numbers(values: Tensor) -> Tensor:
    """Float8 values in float32; looked up, in half the time that torch takes to convert them."""
    table = torch.arange(256, dtype=torch.uint8, device=values.device).view(values.dtype).float()
    return table.index_select(0, _bytes(values).reshape(-1).int()).reshape(values.shape)


def require_numbers(values: Tensor) -> None:
    """Refuse NaN and infinity.

    Raises:
        ValueError: there are some.
    """
    first = FIRST_INFINITE[str(values.dtype).removeprefix("torch.")]
    if not values.is_meta and values.numel() and int((_bytes(values) & 0x7F).max()) >= first:
        raise ValueError("some values are NaN or infinite")


def _bytes(values: Tensor) -> Tensor:
    """Float8 numbers as bytes: torch selects no float8."""
    return values.view(torch.uint8)


@decoder("float8")
def decode_float8(meta: Meta, tensors: Tensors) -> Tensor:
    """w = v * scale; one scale for a block of rows and columns."""
    (out, columns), (height, width) = meta["shape"], meta["block"]
    dtype = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}[meta["dtype"]]
    values, scale = tensors[""].view(dtype).reshape(out, columns).float(), tensors["scale"]
    rows = scale.float().repeat_interleave(height or out, dim=0)[:out]
    return (values * by_column(rows, columns, width)).to(scale.dtype)
