"""A mask of one bit per element, or less where it is N:M, and integer codes of the survivors alone.

w = (q - zero) * scale, or exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from aicompress.weights.coding.packing import WORD, pack_rows, require_bits, unpack_rows
from aicompress.weights.coding.rows import RowStorage, StoredTensor, share
from aicompress.weights.decoding import Meta, Tensors, by_column, decoder, masked, require_kept, unpack
from aicompress.weights.form import Symbols, Weight, require_dtype
from aicompress.weights.grouping import Grouping
from aicompress.weights.stored.int_grouped import Coded, IntGrouped, code_words, groups_of, require_groups, spread
from aicompress.weights.stored.masked import Masked, mask_meta, mask_symbols, mask_tensors, restored_mask, rows_of_words


@dataclass(frozen=True)
class SparseCodes(Masked, Coded):
    """Survivors of a mask as uniform affine codes. At b bits and a share s of zeros: 1 + (1 - s) b bits per weight.

    Attributes:
        mask: (out, in) bool, True where a code is kept.
        codes: (kept,) int8, in the order of the mask's True elements.
        scale: (rows, groups) floating, as in IntGrouped.
        zero: (rows, groups) int8, or None for symmetric codes.
        bits: 1 to 8.
        group_size: columns that share a scale, pruned ones among them; 0 for one scale per row or per tensor.
        grouping: N and M where the mask is N:M and packed as such.
    """

    form: ClassVar[str] = "sparse_codes"
    scales: ClassVar[frozenset[str]] = frozenset({"scale", "zero"})
    mask: Tensor
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group_size: int = 0
    grouping: Grouping | None = None

    @classmethod
    def of(cls, weight: IntGrouped, mask: Tensor, grouping: Grouping | None = None) -> SparseCodes:
        """Keep codes where `mask` is True; the others stand for zero, whatever they were."""
        return cls(mask, weight.codes[mask], weight.scale, weight.zero, weight.bits, weight.group_size, grouping)

    @classmethod
    def outline(cls, weight: IntGrouped, kept: int, grouping: Grouping | None = None) -> SparseCodes:
        """`of` without data, from the outline of the integer weight."""
        mask = torch.empty(weight.shape, dtype=torch.bool, device="meta")
        codes = torch.empty(kept, dtype=torch.int8, device="meta")
        return cls(mask, codes, weight.scale, weight.zero, weight.bits, weight.group_size, grouping)

    def grouped(self) -> IntGrouped:
        if self.mask.device.type == "meta":
            codes = torch.empty(self.shape, dtype=torch.int8, device="meta")
        else:
            codes = self._nothing().masked_scatter_(self.mask, self.codes)
        return IntGrouped(codes, self.scale, self.zero, self.bits, self.group_size)

    def _nothing(self) -> Tensor:
        """(out, in) int8 of codes that stand for zero."""
        if self.zero is None:
            return torch.zeros(self.shape, dtype=torch.int8, device=self.mask.device)
        return spread(self.zero, self.shape[1], self.group_size).expand(self.shape).clone()

    def tensors(self) -> dict[str, Tensor]:
        packed = pack_rows(self.codes.reshape(1, -1), self.bits, 1 << (self.bits - 1)).reshape(-1)
        stored = {**mask_tensors(self.mask, self.grouping), "codes": packed, "scale": self.scale}
        return stored if self.zero is None else {**stored, "zero": self.zero}

    def symbols(self) -> dict[str, Symbols]:
        zero = {} if self.zero is None else {"zero": Symbols("int8", self.zero.shape[0], self.zero.shape[1])}
        return {**mask_symbols(self.mask, self.grouping), "codes": Symbols(self.bits, 1, self.codes.numel()), **zero}

    def meta(self) -> dict[str, Any]:
        return {
            "form": self.form,
            "bits": self.bits,
            "group_size": self.group_size,
            "shape": list(self.shape),
            "kept": self.codes.numel(),
            "symmetric": self.zero is None,
            **mask_meta(self.grouping),
        }

    def dense(self) -> Tensor:
        return self.grouped().dense()

    def numbers(self) -> int:
        return self.codes.numel()

    def describe(self) -> str:
        return ", ".join([*code_words(self.bits, self.group_size, self.zero is None), self.zeros()])

    def row_storage(self) -> RowStorage | None:
        """Of an N:M mask: as many survivors in every row, whose codes end with a word."""
        multiple, meta = rows_of_words(self.grouping), self.meta()
        if not multiple:
            return None
        each = self.codes.numel() // max(1, self.shape[0])
        along = frozenset({"", "codes", "scale", "zero"})

        def of_rows(rows: int) -> dict[str, Any]:
            return {**meta, "shape": [rows, self.shape[1]], "kept": rows * each}

        return RowStorage(along, of_rows, math.lcm(multiple, WORD))

    def read_rows(self, stored: Mapping[str, StoredTensor], rows: slice) -> Weight:
        if self.grouping is not None:
            return super().read_rows(stored, rows)
        mask, kept = self.read_mask(stored[""], rows)
        first = kept.start // WORD * WORD  # so many codes are whole words
        words = stored["codes"].read(slice(first * self.bits // WORD, -(-kept.stop * self.bits // WORD)))
        codes = unpack_rows(words[None], self.bits, kept.stop - first, 1 << (self.bits - 1))[0, kept.start - first :]
        scale, zero = (
            stored[suffix].read(share(stored[suffix].length, rows, self.shape[0])) if suffix in stored else None
            for suffix in ("scale", "zero")
        )
        assert scale is not None
        return replace(self, mask=mask, codes=codes, scale=scale, zero=zero)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> SparseCodes:
        bits = require_bits(int(meta["bits"]))
        require_dtype("codes", tensors["codes"], torch.int32)
        out, columns = meta["shape"]
        size, scale, zero = int(meta["group_size"]), tensors["scale"], tensors.get("zero")
        if zero is not None:
            require_dtype("zero", zero, torch.int8)
        require_groups(scale, zero, out, groups_of(columns, size))
        mask, grouping = restored_mask(tensors, meta, int(meta["kept"]))
        codes = unpack_rows(tensors["codes"].reshape(1, -1), bits, int(meta["kept"]), 1 << (bits - 1)).reshape(-1)
        return cls(mask, codes, scale, zero, bits, size, grouping)


@decoder("sparse_codes")
def decode_sparse_codes(meta: Meta, tensors: Tensors) -> Tensor:
    """w = (q - zero) * scale where the mask is set, computed in float32."""
    out, columns = meta["shape"]
    bits, scale, zero = int(meta["bits"]), tensors["scale"], tensors.get("zero")
    kept = masked(meta, tensors)
    require_kept(kept, int(meta["kept"]))
    codes = unpack(tensors["codes"].reshape(1, -1), bits, int(meta["kept"])).float() - (1 << (bits - 1))
    whole = (
        torch.zeros(out * columns, dtype=codes.dtype, device=kept.device)
        .masked_scatter(kept, codes)
        .reshape(out, columns)
    )
    size = int(meta["group_size"])
    if zero is not None:
        whole = (whole - by_column(zero.float(), columns, size)) * kept.reshape(out, columns)
    return (whole * by_column(scale.float(), columns, size)).to(scale.dtype)
