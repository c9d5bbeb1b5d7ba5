"""Write a stream of symbols that are read in blocks of rows: to the byte the one that static models give for all.

The symbols are read once to be counted, and again from the last to the first, as they are coded. What is held is the
counts and a block: what a block became goes to a file, from which the stream is read in its order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from torch import Tensor

from aicompress.weights.coding.models import SymbolModel, number
from aicompress.weights.coding.quantizers import in_use
from aicompress.weights.coding.rows import BITS_SET
from aicompress.weights.coding.streams import PACKED_STATIC, STATIC, TRELLIS
from aicompress.weights.coding.writing import (
    SMALL,
    SPAN,
    Symbols,
    counted,
    least_bytes,
    rans_encoded,
    rans_encoded_in_steps,
    static_head,
    static_models,
)
from aicompress.weights.decoding import LANES, compiled

Blocks = Sequence[Callable[[], Tensor]]


@dataclass(frozen=True)
class StreamInFile:
    """A stream whose parts are read as they are asked for.

    Attributes:
        head: its first bytes.
        buckets: which follow one another.
        least: bytes that it has at least, zeros at its end.
    """

    head: bytes
    buckets: Sequence[_Bucket]
    least: int

    @property
    def nbytes(self) -> int:
        return max(self.least, self._length)

    @property
    def _length(self) -> int:
        return len(self.head) + sum(len(each.text()) + 2 * each.used for each in self.buckets)

    def pieces(self) -> Iterator[bytes]:
        """All of it, in order."""
        yield self.head
        for each in self.buckets:
            yield each.text()
            yield from each.coded()
        yield bytes(self.nbytes - self._length)


class _Bucket:
    """The stream of a bucket of columns, which grows from its end.

    Attributes:
        models: of its symbols.
        lanes: of the stream.
        width: columns that are coded row by row: all, or of a trellis as many as there are lanes.
        groups: of so many columns.
        used: words of the stream.
        places: where those of a block are in the file, and how many bytes, the stream's last ones first.
    """

    def __init__(self, models: list[SymbolModel], rows: int, columns: int, file: BinaryIO) -> None:
        """A bucket of which nothing is coded yet.

        Args:
            models: of its symbols.
            rows, columns: of the bucket.
            file: what words are appended to.
        """
        self.models, self.file = models, file
        self.lanes = min(LANES, max(1, rows * columns // SPAN))
        self.width, self.groups = columns, 1
        if len(models) == 2:
            self.lanes = max(lane for lane in range(1, min(self.lanes, columns) + 1) if columns % lane == 0)
            self.width, self.groups = self.lanes, columns // self.lanes
        self.states = np.full(self.lanes, 1 << 16, dtype=np.int64)
        self.frequency = np.concatenate([model.frequency for model in models])
        self.start = np.concatenate([np.cumsum(model.frequency) - model.frequency for model in models])
        self.used, self.places = 0, list[tuple[int, int]]()

    def add(self, rows: Symbols, group: int, first: int) -> None:
        """Code rows (rows, columns) of the bucket's columns, after all that follow them.

        Args:
            rows: symbols.
            group: which columns of them are coded.
            first: the number of the first row.
        """
        symbols = np.ascontiguousarray(rows[:, group * self.width : (group + 1) * self.width]).reshape(-1)
        words = np.empty(len(symbols) + 1, dtype=np.uint16)
        shift = first * self.width % self.lanes  # the lane of the first symbol
        states = np.roll(self.states, -shift)
        encode = compiled(rans_encoded) or rans_encoded_in_steps
        more = encode(symbols, states, self.frequency, self.start, self.models[0].bits, words)
        self.states = np.roll(states, shift)
        self.used += more
        self.places.append((self.file.seek(0, os.SEEK_END), 2 * more))
        self.file.write(words[len(words) - more :].astype("<u2", copy=False).data)

    def text(self) -> bytes:
        """The bucket as a stream has it, but for its words."""
        head = number(self.lanes) + number(self.used) + b"".join(model.text() for model in self.models)
        return head + self.states.astype("<u4").tobytes()

    def coded(self) -> Iterator[bytes]:
        """Its words, in order."""
        for place, length in reversed(self.places):
            self.file.seek(place)
            yield self.file.read(length)


def write_in_blocks(blocks: Blocks, shape: tuple[int, int], kind: int | str, file: BinaryIO) -> StreamInFile | None:
    """The stream of many symbols; None where so few are not the same that others may be shorter.

    Args:
        blocks: functions that read blocks of rows of the symbols, uint8, first rows first; of a trellis they begin
            where its states do, of a mask they are eight symbols each.
        shape: (rows, columns) of all of them, more than `SMALL`.
        kind: of the symbols, as a form has them.
        file: takes what is coded.
    """
    (rows, columns), trellis = shape, kind == "trellis"
    models, several = 2 if trellis else 1, 8 <= columns <= 1 << 16
    by_column = np.zeros((columns, models, 256), dtype=np.int64)
    heights = []
    for read in blocks:
        block = _models_of(read(), trellis)
        by_column += counted(block, models)
        heights.append(len(block))
    if _unlike(by_column.sum(axis=(0, 1)), kind) <= SMALL:
        return None
    by_column = by_column if several else by_column.sum(axis=0, keepdims=True)
    _, bits, bucket, chosen = static_models(by_column, several)
    held = [bucket == each for each in range(len(chosen))] if len(chosen) > 1 else [np.ones(columns, dtype=bool)]
    buckets = [_Bucket(own, rows, int(where.sum()), file) for own, where in zip(chosen, held, strict=True)]
    for group in range(max(each.groups for each in buckets) - 1, -1, -1):
        first = rows
        for read, height in zip(reversed(blocks), reversed(heights), strict=True):
            first -= height
            block = _models_of(read(), trellis)
            for each, where in zip(buckets, held, strict=True):
                if group < each.groups:
                    each.add(block[:, where], group, first)
    first_byte = {"trellis": TRELLIS, "mask": PACKED_STATIC}.get(str(kind), STATIC)
    head = bytes([first_byte]) + static_head(bits, bucket, len(chosen))
    return StreamInFile(head, buckets, least_bytes(rows * columns * (8 if kind == "mask" else 1)))


def _unlike(counts: Symbols, kind: int | str) -> int:
    """How many symbols are not the most frequent one, of those that occur so often, (256,)."""
    if kind == "mask":
        ones = int((counts * BITS_SET).sum())
        return min(ones, 8 * int(counts.sum()) - ones)
    return int(counts.sum() - counts.max())


def _models_of(symbols: Tensor, trellis: bool) -> Symbols:
    """Symbols (rows, columns), those of the second of two models with 256 added."""
    matrix: Symbols = symbols.numpy()
    if not trellis:
        return matrix
    return matrix.astype(np.uint16) + 256 * in_use(symbols.short() - 128).numpy().astype(np.uint16)
