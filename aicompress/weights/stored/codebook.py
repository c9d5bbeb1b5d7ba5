"""Codes that look up a table of values: w = table[code] * scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from aicompress.weights.coding.packing import pack_rows, require_bits, unpack_rows
from aicompress.weights.coding.rows import RowStorage
from aicompress.weights.decoding import Meta, Tensors, decoder, unpack
from aicompress.weights.form import Symbols, Weight, require_dtype, require_real

PIECE = 1 << 18  # codes decoded at a time


@dataclass(frozen=True)
class Codebook(Weight):
    """Indices into tables of 2^bits values.

    Attributes:
        codes: (out, in) uint8, below 2^bits.
        tables: (1, 2^bits), (out, 2^bits) or (out * groups, 2^bits) floating: one table for all, per row, or per group
            of a row.
        scale: (out, groups) floating factors of groups of columns, or None.
        bits: 1 to 8.
    """

    form: ClassVar[str] = "codebook"
    scales: ClassVar[frozenset[str]] = frozenset({"tables", "scale"})
    codes: Tensor
    tables: Tensor
    scale: Tensor | None
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])

    @classmethod
    def outline(
        cls, shape: tuple[int, int], bits: int, tables: int, dtype: torch.dtype, scale: tuple[int, int] | None = None
    ) -> Codebook:
        """A weight of this form without data; tables and scales have one dtype."""
        return cls(
            torch.empty(shape, dtype=torch.uint8, device="meta"),
            torch.empty(tables, 1 << bits, dtype=dtype, device="meta"),
            None if scale is None else torch.empty(scale, dtype=dtype, device="meta"),
            bits,
        )

    def tensors(self) -> dict[str, Tensor]:
        # One-dimensional, so that it can never have the shape of a dense matrix, not even (out, 1).
        stored = {"": pack_rows(self.codes, self.bits).reshape(-1), "tables": self.tables}
        return stored if self.scale is None else {**stored, "scale": self.scale}

    def symbols(self) -> dict[str, Symbols]:
        return {"": Symbols(self.bits, *self.shape)}

    def meta(self) -> dict[str, Any]:
        return {"form": self.form, "bits": self.bits, "shape": list(self.shape)}

    def describe(self) -> str:
        return f"{self.bits}-bit"

    def dense(self) -> Tensor:
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> Tensor:
        out, columns = self.shape
        stop = min(stop, out)
        dense = torch.empty(max(0, stop - start), columns, dtype=torch.float32, device=self.codes.device)
        step = max(1, PIECE // max(1, columns))
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            dense[begin - start : end - start] = self._decode(begin, end)
        return dense

    def _decode(self, start: int, stop: int) -> Tensor:
        count = self.tables.shape[0]
        per_row = count // self.shape[0] if count > 1 else 1
        codes = self.codes[start:stop].long()
        if count == 1:
            values = self.tables[0].float()[codes]
        else:
            tables = self.tables[start * per_row : stop * per_row].float()
            values = tables.gather(1, codes.reshape(len(tables), -1)).reshape(codes.shape)
        if self.scale is None:
            return values
        grouped = values.reshape(len(codes), self.scale.shape[1], -1)
        return (grouped * self.scale[start:stop].float()[..., None]).reshape(codes.shape)

    def row_storage(self) -> RowStorage:
        return RowStorage.of(self.meta(), "", "tables", "scale")

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Codebook:
        out, columns = meta["shape"]
        bits = require_bits(int(meta["bits"]))
        tables, scale = tensors["tables"], tensors.get("scale")
        require_dtype("codes", tensors[""], torch.int32)
        require_real(tables=tables, scale=scale)
        if tables.shape[1] != 1 << bits or (len(tables) != 1 and (not len(tables) or len(tables) % out)):
            raise ValueError(f"tables {list(tables.shape)} of {bits} bits for {out} rows")
        if scale is not None and (len(scale) != out or not scale.shape[1] or columns % scale.shape[1]):
            raise ValueError(f"scales {list(scale.shape)} for {out} rows of {columns}")
        return cls(unpack_rows(tensors[""].reshape(out, -1), bits, columns), tables, scale, bits)


@decoder("codebook")
def decode_codebook(meta: Meta, tensors: Tensors) -> Tensor:
    """w = table[code] * scale; one table for all, per row, or per group of a row."""
    out, columns = meta["shape"]
    tables, scale = tensors["tables"], tensors.get("scale")
    codes = unpack(tensors[""].reshape(out, -1), int(meta["bits"]), columns).long()
    if tables.shape[0] == 1:
        values = tables[0][codes]
    else:
        values = tables.gather(1, codes.reshape(tables.shape[0], -1)).reshape(out, columns)
    if scale is None:
        return values
    return (values.reshape(out, scale.shape[1], -1) * scale[..., None]).reshape(out, columns)
