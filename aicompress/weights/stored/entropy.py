"""Another stored form whose codes, indices and masks are entropy-coded: streams that need fewer bits than its width."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from aicompress.weights.coding.packing import WORD, pack_mask, pack_rows, unpack_mask, unpack_rows, words_per_row
from aicompress.weights.coding.reading import AGAIN, SymbolStream
from aicompress.weights.coding.rows import StoredTensor
from aicompress.weights.coding.streams import read_stream
from aicompress.weights.coding.writing import write_stream
from aicompress.weights.decoding import SYMBOLS_PER_BYTE, Meta, Tensors, decode, decoder, pack
from aicompress.weights.form import Symbols, Weight, inside, nest, outline_nbytes, require_dtype, restore, within

NONE: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class EntropyCoded(Weight):
    """A weight in another form, with some of its tensors as streams of bytes.

    Attributes:
        inner: the same weight with codes of a fixed width, in a form that no other one is part of.
        streams: (bytes,) uint8 by suffix of the inner form's tensor.
        coded: how that tensor holds its symbols, by the same suffixes.
    """

    form: ClassVar[str] = "entropy"
    inner: Weight
    streams: dict[str, Tensor]
    coded: dict[str, Symbols]

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    @classmethod
    def of(cls, weight: Weight, known: Mapping[str, Tensor] = NONE) -> Weight:
        """The weight with those of its tensors coded that become smaller; itself where none does.

        Args:
            weight: without data in tensors whose streams are known.
            known: streams by suffix.
        """
        tensors, streams, coded = weight.tensors(), {}, {}
        for suffix, symbols in weight.symbols().items():
            stored = tensors[suffix]
            if symbols.rows * symbols.columns:
                stream = known.get(suffix)
                stream = write_stream(symbols_of(stored, symbols), symbols.kind) if stream is None else stream
                if stream.numel() < stored.nbytes:
                    streams[suffix], coded[suffix] = stream, symbols
        return cls(weight, streams, coded) if streams else weight

    def tensors(self) -> dict[str, Tensor]:
        return {**self.inner.tensors(), **self.streams}

    def meta(self) -> dict[str, Any]:
        inner = self.inner.meta()
        coded = {suffix: [s.kind, s.rows, s.columns] for suffix, s in self.coded.items()}
        rounded = {key: inner[key] for key in ("activation_bits",) if key in inner}  # readers ask the outer form
        return {"form": self.form, "inner": inner, "coded": coded, **rounded}

    def dense(self) -> Tensor:
        return self.inner.dense()

    def rows(self, start: int, stop: int) -> Tensor:
        return self.inner.rows(start, stop)

    def numbers(self) -> int:
        return self.inner.numbers()

    def describe(self) -> str:
        return ", ".join(filter(None, (self.inner.describe(), "entropy-coded")))

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> EntropyCoded:
        coded = {suffix: Symbols(kind, int(r), int(c)) for suffix, (kind, r, c) in meta["coded"].items()}
        if not coded or meta["inner"]["form"] == cls.form:
            raise ValueError("nothing of it is entropy-coded")
        streams = {suffix: tensors[suffix] for suffix in coded}
        fixed = dict(tensors)
        for suffix, stream in streams.items():
            require_dtype("an entropy-coded stream", stream, torch.uint8)
            require_size(stream, coded[suffix])
            fixed[suffix] = _stored(stream, coded[suffix])
        inner = restore(fixed, meta["inner"])
        if any(inner.symbols().get(suffix) != symbols for suffix, symbols in coded.items()):
            raise ValueError("its streams hold other symbols than its form has")
        return cls(inner, streams, coded)


def entropy_coded(weight: Weight, letter: float = 1.0, known: Mapping[str, Tensor] = NONE) -> Weight:
    """A weight with the codes, indices and masks entropy-coded of all forms that it is made of, where that saves bytes.

    Args:
        weight: in any form.
        letter: bytes that a letter of its description takes in the file: more with indentation, fewer deflated.
        known: streams that are made already, by suffix; without data there.
    """
    if isinstance(weight, EntropyCoded):
        return weight
    fields = inside(weight).items()
    parts = {name: entropy_coded(part, letter, weight.of_part(name, known)) for name, part in fields}
    if parts:
        return dataclasses.replace(weight, **parts)  # type: ignore[type-var]
    coded = EntropyCoded.of(weight, known)
    described = len(json.dumps(coded.meta())) - len(json.dumps(weight.meta()))
    return coded if outline_nbytes(coded) + letter * described < outline_nbytes(weight) else weight


def symbols_within(weight: Weight) -> dict[str, Symbols]:
    """How the tensors of a weight, and of the weights inside it, hold codes, indices and masks, by suffix."""
    symbols = weight.symbols()
    for name, part in inside(weight).items():
        symbols |= nest(weight.prefixes[name], symbols_within(part))
    return symbols


def fixed_width(weight: Weight) -> Weight:
    """Undo `entropy_coded`."""
    if isinstance(weight, EntropyCoded):
        return weight.inner
    changed = {name: fixed for name, part in inside(weight).items() if (fixed := fixed_width(part)) is not part}
    return dataclasses.replace(weight, **changed) if changed else weight  # type: ignore[type-var]


def in_fixed_width(outline: Weight, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of `fixed_width(outline)`, those of streams decoded in parts.

    Args:
        outline: of the weight as it is stored.
        stored: its tensors.
    """
    coded = [each for each in within(outline) if isinstance(each, EntropyCoded)]
    symbols = {id(stream): each.coded[suffix] for each in coded for suffix, stream in each.streams.items()}
    return {
        suffix: _decoded(stored[suffix], symbols[id(tensor)]) if id(tensor) in symbols else stored[suffix]
        for suffix, tensor in outline.tensors().items()
    }


def _decoded(stream: StoredTensor, symbols: Symbols) -> StoredTensor:
    """A form's tensor of the stream of its symbols, read in parts."""
    rows, columns, bits = symbols.rows, symbols.columns, symbols.bits
    held = SymbolStream(lambda first, last: stream.read(slice(first, last)), stream.length, rows, columns)
    length = len(_stored(torch.empty(0, device="meta"), symbols))
    words = words_per_row(columns, bits)

    def read(part: slice | None) -> Tensor:
        first, last = (0, length) if part is None else (part.start, part.stop)
        if symbols.kind == "mask":
            return held.packed(first, last)
        if symbols.kind == "int8":
            return held.read(first * columns, last * columns).view(torch.int8).reshape(-1, columns)
        if not bits:
            return held.read(first, last)
        if rows == 1:
            codes = held.read(first * WORD // bits, min(columns, -(-last * WORD // bits)))
            return pack_rows(codes[None], bits).reshape(-1)[: last - first]
        codes = held.read(first // words * columns, last // words * columns)
        return pack_rows(codes.reshape(-1, columns), bits).reshape(-1)

    multiple = bits if rows == 1 else words * (AGAIN if symbols.kind == "trellis" else 1)
    return StoredTensor(read, length, multiple if bits else 1)


def require_size(stream: Tensor, symbols: Symbols) -> None:
    """Refuse more symbols than a stream of so many bytes may hold, before there is memory for them.

    Raises:
        ValueError: they are more, or no number.
    """
    count = symbols.rows * symbols.columns
    if min(symbols.rows, symbols.columns) < 0 or count > SYMBOLS_PER_BYTE * stream.numel() or stream.ndim != 1:
        raise ValueError(f"{count:,} symbols in a stream of {stream.numel():,} bytes")


def symbols_of(stored: Tensor, symbols: Symbols) -> Tensor:
    """The symbols (rows, columns) uint8 of a form's tensor."""
    shape = (symbols.rows, symbols.columns)
    if symbols.kind == "mask":
        return unpack_mask(stored, math.prod(shape)).to(torch.uint8).reshape(shape)
    if symbols.bits:
        return unpack_rows(stored.reshape(symbols.rows, -1), symbols.bits, symbols.columns)
    return stored.contiguous().view(torch.uint8).reshape(shape)


def _stored(stream: Tensor, symbols: Symbols) -> Tensor:
    """A form's tensor of the stream of its symbols."""
    rows, columns = symbols.rows, symbols.columns
    if stream.is_meta:
        dtype = torch.uint8
        if symbols.kind == "mask":
            return torch.empty(-(-rows * columns // 8), dtype=dtype, device="meta")
        if symbols.bits:
            words = rows * words_per_row(columns, symbols.bits)
            return torch.empty(words, dtype=torch.int32, device="meta")
        if symbols.kind == "int8":
            return torch.empty(rows, columns, dtype=torch.int8, device="meta")
        return torch.empty(rows * columns, dtype=dtype, device="meta")
    held = read_stream(stream, rows, columns)
    if symbols.kind == "mask":
        return pack_mask(held.bool().reshape(-1))
    if symbols.bits:
        return pack_rows(held, symbols.bits).reshape(-1)
    return held.view(torch.int8) if symbols.kind == "int8" else held.reshape(-1)


@decoder("entropy")
def decode_entropy(meta: Meta, tensors: Tensors) -> Tensor:
    """The matrix of the inner form, whose tensors are made of the streams."""
    fixed = dict(tensors)
    for suffix, (kind, rows, columns) in meta["coded"].items():
        symbols = read_stream(tensors[suffix], int(rows), int(columns))
        if kind == "mask":
            packed = np.packbits(symbols.cpu().numpy().reshape(-1), bitorder="little")
            fixed[suffix] = torch.from_numpy(packed).to(symbols.device)
        elif isinstance(kind, int) or kind == "trellis":
            fixed[suffix] = pack(symbols, 8 if kind == "trellis" else kind).reshape(-1)
        else:
            fixed[suffix] = symbols.view(torch.int8) if kind == "int8" else symbols.reshape(-1)
    return decode(meta["inner"], fixed)
