"""Read a stream of symbols a few rows at a time.

Streams are coded from their first symbol to their last one. Where each part ended that was decoded, the states of the
lanes are kept: a pass over a tensor decodes every symbol once, and one that begins anew goes on from what is known.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aicompress.weights.coding.packing import pack_mask
from aicompress.weights.coding.streams import (
    PACKED_STATIC,
    STATIC,
    TRELLIS,
    WITHIN,
    decode_symbols,
    in_their_columns,
    read_bucket_head,
    read_head,
    read_stream,
)
from aicompress.weights.decoding import count_at

HEAD = 1 << 14  # bytes that hold what a bucket begins with: counts, models and the states of its lanes
STEP = 1 << 20  # symbols that are decoded at a time to come to others
AGAIN = 256  # rows after which the state of a trellis starts anew
Symbols: TypeAlias = NDArray[Any]
Read = Callable[[int, int], Tensor]  # (first byte, the one after the last) -> (bytes,) uint8


class Matrix(Protocol):
    """Symbols (height, width) that are read in rows."""

    @property
    def width(self) -> int:
        """Of a row."""

    def rows(self, first: int, last: int) -> Symbols:
        """Some of its rows, uint8.

        Raises:
            ValueError: the stream is damaged.
        """


class SymbolStream:
    """A stream of symbols (rows, columns) in a file; nothing of it is read before symbols are asked for."""

    def __init__(self, read: Read, length: int, rows: int, columns: int) -> None:
        """A stream.

        Args:
            read: gives some of its bytes.
            length: of these.
            rows, columns: of the symbols.
        """
        self._stream, self._rows, self._columns = (read, length), rows, columns
        self._matrix: Matrix | None = None
        self._lock, self._is_packed = Lock(), False

    def read(self, first: int, last: int) -> Tensor:
        """Symbols (last - first,) uint8, counted row by row; of a trellis they begin where its states do.

        Raises:
            ValueError: the stream is damaged.
        """
        with self._lock:
            matrix = self._opened()
            begin, end = first // matrix.width, -(-last // matrix.width)
            symbols = matrix.rows(begin, end).reshape(-1)
            return torch.from_numpy(symbols[first - begin * matrix.width : last - begin * matrix.width])

    def packed(self, first: int, last: int) -> Tensor:
        """Symbols of one bit as bytes (last - first,) of a bit mask; errors as of `read`."""
        with self._lock:
            self._opened()
        if self._is_packed:
            return self.read(first, last)
        return pack_mask(self.read(8 * first, min(8 * last, self._rows * self._columns)).bool())

    def _opened(self) -> Matrix:
        if self._matrix is None:
            (read, length), rows, columns = self._stream, self._rows, self._columns
            kind = int(read(0, 1)[0]) if length else -1
            self._is_packed = kind == PACKED_STATIC
            if self._is_packed:
                self._matrix = _Static(read, length, 1, -(-rows * columns // 8))
            elif kind in (STATIC, TRELLIS):
                self._matrix = _Static(read, length, rows, columns, 2 if kind == TRELLIS else 1)
            elif kind == WITHIN:
                self._matrix = _Within(read, length, rows, columns)
            else:
                self._matrix = _Held(read_stream(read(0, length), rows, columns).numpy())
        return self._matrix


@dataclass(frozen=True)
class _Held:
    """Symbols that are few, and all there."""

    symbols: Symbols

    @property
    def width(self) -> int:
        return max(1, int(self.symbols.shape[1]))

    def rows(self, first: int, last: int) -> Symbols:
        return self.symbols[first:last]


class _Within:
    """Symbols of which only some rows and columns hold others than the most frequent one: these are all there."""

    def __init__(self, read: Read, length: int, rows: int, columns: int) -> None:
        head = read(0, min(HEAD, length)).numpy()
        places, at = count_at(head, 4)
        end = at + places
        if end >= length:
            raise ValueError("a stream of symbols is damaged: it ends too early")
        filled = read_stream(read(at, end), 1, rows + columns).reshape(-1).numpy() != 0
        self.width, self._height = columns, rows
        self._filled, self._columns = filled[:rows], filled[rows:]
        inner = int(self._filled.sum()), int(self._columns.sum())
        self._symbols, self._common = read_stream(read(end, length), *inner).numpy(), int(head[1])
        self._sum, self._summed, self._checksum = 0, 0, int(head[2]) | int(head[3]) << 8

    def rows(self, first: int, last: int) -> Symbols:
        symbols = np.full((last - first, self.width), self._common, dtype=np.uint8)
        before, own = int(self._filled[:first].sum()), self._filled[first:last]
        symbols[np.ix_(own, self._columns)] = self._symbols[before : before + int(own.sum())]
        if first <= self._summed < last:
            self._sum = zlib.crc32(symbols[self._summed - first :].tobytes(), self._sum)
            self._summed = last
            if last == self._height and self._sum & 0xFFFF != self._checksum:
                raise ValueError("a stream of symbols is damaged: its checksum is another one")
        return symbols


@dataclass
class _Lanes:
    """Lanes that take symbols in turn, row by row: those of a bucket, or of as many columns of a trellis.

    Attributes:
        columns: how many.
        states, used: at the first symbol, and how many words lie before it.
        words, begin: of the bucket, and where they begin in the stream.
        tables: of the bucket's models.
        is_last: nothing follows them in the bucket.
    """

    columns: int
    states: Symbols
    used: int
    words: int
    begin: int
    tables: Any
    is_last: bool


class _Static:
    """Symbols that are coded with static models; of a single bucket, where rows do not count, each is a row.

    Attributes:
        width: symbols of a row.
    """

    def __init__(self, read: Read, length: int, rows: int, columns: int, models: int = 1) -> None:
        self._read, self._length = read, length
        self._bits, buckets, bucket, at = read_head(self._bytes(0, 3 + columns), columns)
        flat = buckets == 1 and models == 1
        self._height, self.width = (rows * columns, 1) if flat else (rows, columns)
        self._step = max(1, STEP // max(1, self.width) // AGAIN) * AGAIN
        self._lanes, self._lanes_of = list[_Lanes](), np.zeros(self.width, dtype=np.int64)  # by column
        for number in range(buckets):
            at = self._open_bucket(at, np.flatnonzero(bucket[: self.width] == number), models)
        if any(bool(self._bytes(first, first + STEP).any()) for first in range(at, length, STEP)):
            raise ValueError("a stream of symbols is damaged: something follows its end")
        # By rows that a part ended before: the states of all lanes, and how many words were used.
        self._marks = {0: [(lanes.states, lanes.used) for lanes in self._lanes]}

    def _bytes(self, first: int, last: int) -> Symbols:
        held: Symbols = self._read(first, min(last, self._length)).numpy()
        return held

    def _open_bucket(self, at: int, columns: Symbols, models: int) -> int:
        """Find where the lanes of a bucket's columns begin; returns where the next bucket does."""
        states, words, tables, within = read_bucket_head(self._bytes(at, at + HEAD), 0, self._bits, models)
        width = len(columns) if models == 1 else len(states)
        if at + within + 2 * words > self._length or len(columns) % max(1, width):
            raise ValueError("a stream of symbols is damaged: it ends too early")
        used = 0
        for first in range(0, len(columns), max(1, width)):
            is_last = first + width == len(columns)
            lanes = _Lanes(width, states, used, words, at + within, tables, is_last)
            self._lanes_of[columns[first : first + width]] = len(self._lanes)
            self._lanes.append(lanes)
            if not is_last:  # the next columns begin where these end
                for row in range(0, self._height, self._step):
                    _, states, used = self._decoded(lanes, row, min(row + self._step, self._height), states, used)
        return at + within + 2 * words

    def rows(self, first: int, last: int) -> Symbols:
        known = max(row for row in self._marks if row <= first)
        while known < first:
            self._part(known, min(known + self._step, first))
            known = min(known + self._step, first)
        return self._part(first, last)

    def _part(self, first: int, last: int) -> Symbols:
        """Rows of which the first one is marked; the one behind the last one is then."""
        starts = zip(self._lanes, self._marks[first], strict=True)
        parts = [self._decoded(lanes, first, last, *start) for lanes, start in starts]
        self._marks[last] = [(states, used) for _, states, used in parts]
        if len(parts) == 1:
            return parts[0][0]
        by_lanes = np.concatenate([symbols.reshape(-1) for symbols, _, _ in parts])
        in_columns: Symbols = in_their_columns(by_lanes, self._lanes_of, last - first)
        return in_columns

    def _decoded(
        self, lanes: _Lanes, first: int, last: int, states: Symbols, used: int
    ) -> tuple[Symbols, Symbols, int]:
        """Rows of the columns of some lanes, with the states behind them and how many words were used by then."""
        shift, out = first * lanes.columns % len(states), np.empty((last - first, lanes.columns), dtype=np.uint8)
        current = np.roll(states, -shift).astype(np.int64)
        begin = lanes.begin + 2 * used
        words = self._bytes(begin, min(begin + 2 * out.size, lanes.begin + 2 * lanes.words))
        more = decode_symbols(current, words, lanes.tables, self._bits, out)
        ends = last == self._height and lanes.is_last
        if more < 0 or (ends and (used + more != lanes.words or bool((current != 1 << 16).any()))):
            raise ValueError("a stream of symbols is damaged: it does not end where it began")
        return out, np.roll(current, shift).astype(np.uint32), used + more
