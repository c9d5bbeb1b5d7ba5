"""Write a stream of symbols that are read in blocks of rows: to the byte the one that static models give for all.

The symbols are read once to be counted, and again from the last to the first, as they are coded. What is held is the
stream, the counts and a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from aicompress.weights.coding.models import Model, number
from aicompress.weights.coding.quantizers import in_use
from aicompress.weights.coding.streams import STATIC, TRELLIS
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


class _Bucket:
    """The stream of a bucket of columns, which grows from its end.

    Attributes:
        models: of its symbols.
        lanes: of the stream.
        width: columns that are coded row by row: all, or of a trellis as many as there are lanes.
        groups: of so many columns.
        words: of the stream, the last `used` of them; one piece of memory, as many would leave holes between blocks.
    """

    def __init__(self, models: list[Model], counts: Symbols, rows: int, columns: int) -> None:
        """A bucket of which nothing is coded yet.

        Args:
            models: of its symbols.
            counts: how often each model codes each, (models, 256).
            rows, columns: of the bucket.
        """
        self.models = models
        self.lanes = min(LANES, max(1, rows * columns // SPAN))
        self.width, self.groups = columns, 1
        if len(models) == 2:
            self.lanes = max(lane for lane in range(1, min(self.lanes, columns) + 1) if columns % lane == 0)
            self.width, self.groups = self.lanes, columns // self.lanes
        self.states = np.full(self.lanes, 1 << 16, dtype=np.int64)
        self.frequency = np.concatenate([model.frequency for model in models])
        self.start = np.concatenate([np.cumsum(model.frequency) - model.frequency for model in models])
        bits = sum(model.cost(each) for model, each in zip(models, counts, strict=True))
        self.words, self.used = np.empty(int(bits / 16 * 1.001) + self.lanes, dtype=np.uint16), 0

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
        if self.used + more > len(self.words):  # longer than its models say
            self.words = np.concatenate([np.empty(more, dtype=np.uint16), self.words])
        end = len(self.words) - self.used
        self.words[end - more : end] = words[len(words) - more :]
        self.used += more

    def text(self) -> bytes:
        """The bucket as a stream has it, but for its words."""
        head = number(self.lanes) + number(self.used) + b"".join(model.text() for model in self.models)
        return head + self.states.astype("<u4").tobytes()

    def coded(self) -> Symbols:
        """Its words as bytes."""
        return self.words[len(self.words) - self.used :].astype("<u2", copy=False).view(np.uint8)


def write_in_blocks(blocks: Blocks, shape: tuple[int, int], trellis: bool) -> Tensor | None:
    """The stream (bytes,) uint8 of many symbols; None where so few are not the same that others may be shorter.

    Args:
        blocks: functions that read blocks of rows of the symbols, uint8, first rows first; of a trellis they begin
            where its states do.
        shape: (rows, columns) of all of them, more than `SMALL`.
        trellis: the symbols are codes of two quantizers.
    """
    rows, columns = shape
    models, several = 2 if trellis else 1, 8 <= columns <= 1 << 16
    by_column = np.zeros((columns, models, 256), dtype=np.int64)
    heights = []
    for read in blocks:
        block = _models_of(read(), trellis)
        by_column += counted(block, models)
        heights.append(len(block))
    if rows * columns - by_column.sum(axis=(0, 1)).max() <= SMALL:
        return None
    by_column = by_column if several else by_column.sum(axis=0, keepdims=True)
    _, bits, bucket, chosen = static_models(by_column, several)
    held = [bucket == each for each in range(len(chosen))] if len(chosen) > 1 else [np.ones(columns, dtype=bool)]
    buckets = [
        _Bucket(own, by_column[where if several else slice(None)].sum(axis=0), rows, int(where.sum()))
        for own, where in zip(chosen, held, strict=True)
    ]
    for group in range(max(each.groups for each in buckets) - 1, -1, -1):
        first = rows
        for read, height in zip(reversed(blocks), reversed(heights), strict=True):
            first -= height
            block = _models_of(read(), trellis)
            for each, where in zip(buckets, held, strict=True):
                if group < each.groups:
                    each.add(block[:, where], group, first)
    head = bytes([TRELLIS if trellis else STATIC]) + static_head(bits, bucket, len(chosen))
    return _joined(head, buckets, least_bytes(rows * columns))


def _joined(head: bytes, buckets: list[_Bucket], least: int) -> Tensor:
    """The stream of buckets, (bytes,) uint8, zeros after it where it has fewer bytes than it must have."""
    texts = [each.text() for each in buckets]
    length = len(head) + sum(len(text) + 2 * each.used for text, each in zip(texts, buckets, strict=True))
    stream, place = np.zeros(max(least, length), dtype=np.uint8), 0
    parts = [part for text, each in zip(texts, buckets, strict=True) for part in (text, each.coded())]
    for part in (head, *parts):
        stream[place : place + len(part)] = np.frombuffer(part, dtype=np.uint8)
        place += len(part)
    return torch.from_numpy(stream)


def _models_of(symbols: Tensor, trellis: bool) -> Symbols:
    """Symbols (rows, columns), those of the second of two models with 256 added."""
    matrix: Symbols = symbols.numpy()
    if not trellis:
        return matrix
    return matrix.astype(np.uint16) + 256 * in_use(symbols.short() - 128).numpy().astype(np.uint16)
