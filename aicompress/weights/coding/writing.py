"""Write symbols as a stream: of all ways to code them the one that takes least bytes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aicompress.weights.coding.adaptive import write_adaptive
from aicompress.weights.coding.mixed import write_mixed
from aicompress.weights.coding.models import PRECISIONS, SymbolModel, number
from aicompress.weights.coding.quantizers import in_use
from aicompress.weights.coding.streams import BUCKETS, PACKED_STATIC, STATIC, TRELLIS, WITHIN
from aicompress.weights.decoding import LANES, SYMBOLS_PER_BYTE, checksum, compiled

Symbols = NDArray[Any]
TINY = 10_000  # symbols up to which adaptive contexts are tried, whatever they are
SMALL = 1 << 18  # the same where one symbol is more frequent than all others; more would take seconds to read
MIXED_FROM = 4096  # symbols from which mixtures are tried: of fewer they learn too late
COUNTED = 1 << 20  # symbols at a time
SPAN = 1 << 13  # symbols of a lane: each costs some three bytes


def write_stream(symbols: Tensor, kind: int | str = 8) -> Tensor:
    """The shortest stream, (bytes,) uint8, of symbols (rows, columns) uint8.

    Args:
        symbols: one at least.
        kind: of the symbols, as a form has them: `mask` for 0 and 1, `trellis` for codes of two quantizers.
    """
    matrix = symbols.detach().cpu().contiguous().numpy()
    counts = _total(matrix)
    if kind == "mask":
        packed = np.packbits(matrix.reshape(1, -1), axis=1, bitorder="little")
        stream = bytes([PACKED_STATIC]) + _static(packed)
    elif kind == "trellis":
        quantizer = in_use(symbols.short() - 128).cpu().numpy()
        stream = bytes([TRELLIS]) + _static(matrix.astype(np.uint16) + 256 * quantizer.astype(np.uint16), 2)
    else:
        stream = bytes([STATIC]) + _static(matrix)
    if 2 * counts.max() > matrix.size and sum(matrix.shape) <= SMALL:
        stream = min([stream, *_within(matrix, int(counts.argmax()))], key=len)
    stream = _padded(min([stream, *_adaptive(matrix, _widths(matrix))], key=len), matrix.size)
    return torch.frombuffer(bytearray(stream), dtype=torch.uint8)


def _total(matrix: Symbols) -> Symbols:
    """How often each symbol occurs, (256,); numpy makes eight bytes of every symbol that it counts."""
    flat, total = matrix.reshape(-1), np.zeros(256, dtype=np.int64)
    for begin in range(0, flat.size, COUNTED):
        total += np.bincount(flat[begin : begin + COUNTED], minlength=256)
    return total


def _padded(stream: bytes, symbols: int) -> bytes:
    return stream.ljust(least_bytes(symbols), b"\0")


def least_bytes(symbols: int) -> int:
    """The bytes of a stream that readers expect at least of so many symbols."""
    return -(-symbols // SYMBOLS_PER_BYTE)


def _adaptive(matrix: Symbols, widths: list[int]) -> list[bytes]:
    """Streams whose models are learnt on the way, where reading one takes little time.

    Args:
        widths: of the images that rows may be.
    """
    if matrix.size > TINY and (matrix.size > SMALL or 2 * _total(matrix).max() <= matrix.size):
        return []
    mixed = [write_mixed(matrix, width) for width in widths or [0]] if matrix.size > MIXED_FROM else []
    return [*mixed, *(write_adaptive(matrix, look) for look in (0, 1, *widths))]


def _within(matrix: Symbols, centre: int) -> list[bytes]:
    """Streams of the rows, and of the rows and columns, that hold another symbol than the most frequent, and where."""
    filled = matrix != centre
    rows, columns = filled.any(axis=1), filled.any(axis=0)
    streams = []
    for kept in (np.ones_like(columns), columns):
        if 0 < rows.sum() * kept.sum() <= min(SMALL, matrix.size - 1):
            inner = np.ascontiguousarray(matrix[np.ix_(rows, kept)])
            places = _padded(write_adaptive(np.concatenate([rows, kept]).astype(np.uint8)[None], 1), sum(matrix.shape))
            head = bytes([WITHIN, centre]) + checksum(matrix.tobytes()).to_bytes(2, "little") + number(len(places))
            coded = _adaptive(inner, _widths(matrix) if kept.all() else [])
            streams += [head + places + _padded(stream, inner.size) for stream in coded]
    return streams


def _widths(matrix: Symbols) -> list[int]:
    """Widths of the images that rows may be: squares, or squares of several channels, one after the other."""
    rows, columns = matrix.shape
    if rows < 2 or matrix.size < SPAN:
        return []
    root = math.isqrt(columns)
    if root * root == columns:
        return [root] if 3 <= root < 256 else []
    side = next((side for side in (7, 5, 4, 3) if columns % side**2 == 0), 0)
    return [side, side**2] if side else []


def _static(matrix: Symbols, models: int = 1) -> bytes:
    """A stream with static models, but for its first byte: of all columns, or of buckets of columns alike in spread.

    Args:
        matrix: symbols (rows, columns); those of the second of two models have 256 added.
        models: of each bucket.
    """
    rows, columns = matrix.shape
    several = rows >= 16 and 8 <= columns <= 1 << 16 and matrix.size > TINY  # fewer symbols tell nothing of columns
    _, bits, bucket, chosen = static_models(counted(matrix if several else matrix.reshape(-1, 1), models), several)
    stream = bytearray(static_head(bits, bucket, len(chosen)))
    for each, pair in enumerate(chosen):
        stream += _bucket(matrix if len(chosen) == 1 else matrix[:, bucket == each], pair)
    return bytes(stream)


def static_head(bits: int, bucket: Symbols, buckets: int) -> bytes:
    """What a stream with static models begins with: their precision, and which bucket each column is in."""
    head = bytes([bits, buckets])
    if buckets == 1:
        return head
    even = np.pad(bucket, (0, len(bucket) % 2))
    packed: bytes = (even[::2] | even[1::2] << 4).astype(np.uint8).tobytes()
    return head + packed


def static_bits(by_column: Symbols) -> float:
    """Bits that columns take in a stream with static models, without the few that its lanes end with.

    Args:
        by_column: how often each symbol occurs, (columns, models, 256), in a large matrix.
    """
    return static_models(by_column, 8 <= len(by_column) <= 1 << 16)[0]


def static_models(by_column: Symbols, several: bool) -> tuple[float, int, Any, list[list[SymbolModel]]]:
    """The static models of least bits: these, their precision, the bucket of each column and a bucket's models.

    Args:
        by_column: how often each symbol occurs, (columns, models, 256).
        several: columns may have unlike models.
    """
    columns = len(by_column)
    best: tuple[float, int, Any, list[list[SymbolModel]]] | None = None
    for buckets in (1, 4, BUCKETS):
        if buckets > 1 and (not several or columns < 2 * buckets):
            continue
        bucket = _buckets(by_column.sum(axis=1), buckets)
        counts = [_known(by_column[bucket == each].sum(axis=0)) for each in range(buckets)]
        for bits in PRECISIONS:
            if any((each > 0).sum(axis=1).max() > 1 << (bits - 2) for each in counts):
                continue
            chosen = [[SymbolModel.of(each, bits) for each in pair] for pair in counts]
            flat = [(m, c) for pair, own in zip(chosen, counts, strict=True) for m, c in zip(pair, own, strict=True)]
            size = sum(model.cost(each) + 8 * len(model.text()) for model, each in flat)
            size += 4 * columns if buckets > 1 else 0
            if best is None or size < best[0] * (1 - 1e-4):  # a larger table has to be worth it
                best = (size, bits, bucket, chosen)
    assert best is not None
    return best


def _known(counts: Symbols) -> Symbols:
    """Counts (models, 256) of which a model that is never used has those of the other one."""
    return np.where(counts.sum(axis=1, keepdims=True) > 0, counts, counts.sum(axis=0))


def counted(matrix: Symbols, models: int) -> Symbols:
    """How often each symbol occurs in each column, (columns, models, 256)."""
    rows, columns = matrix.shape
    width = int(matrix.max()) + 1
    counts = np.zeros(columns * width, dtype=np.int64)
    offset = np.arange(columns, dtype=np.int64) * width
    step = max(1, COUNTED // columns)
    for begin in range(0, rows, step):
        counts += np.bincount((matrix[begin : begin + step] + offset).reshape(-1), minlength=columns * width)
    return np.pad(counts.reshape(columns, width), ((0, 0), (0, 256 * models - width))).reshape(columns, models, 256)


def _buckets(by_column: Symbols, buckets: int) -> Symbols:
    """The bucket of each column: as many columns each, in order of the variance of their symbols."""
    columns, value = len(by_column), np.arange(256)
    total = by_column.sum(axis=1)
    mean = (by_column @ value) / total
    order = np.argsort((by_column @ value**2) / total - mean**2, kind="stable")
    bucket = np.empty(columns, dtype=np.uint8)
    bucket[order] = np.arange(columns) * buckets // columns
    return bucket


def _bucket(matrix: Symbols, models: list[SymbolModel]) -> bytes:
    """The part of a stream that one bucket of columns is."""
    columns = matrix.shape[1]
    lanes = min(LANES, max(1, matrix.size // SPAN))
    if len(models) == 2:  # a lane has whole columns
        lanes = max(lane for lane in range(1, min(lanes, columns) + 1) if columns % lane == 0)
        matrix = matrix.reshape(len(matrix), -1, lanes).transpose(1, 0, 2)
    symbols = np.ascontiguousarray(matrix).reshape(-1)
    states = np.full(lanes, 1 << 16, dtype=np.int64)
    words = np.empty(len(symbols) + 1, dtype=np.uint16)
    frequency = np.concatenate([model.frequency for model in models])
    start = np.concatenate([np.cumsum(model.frequency) - model.frequency for model in models])
    encode = compiled(rans_encoded) or rans_encoded_in_steps
    used = encode(symbols, states, frequency, start, models[0].bits, words)
    tail = words[len(words) - used :]
    head = number(lanes) + number(used) + b"".join(model.text() for model in models)
    return head + states.astype("<u4").tobytes() + tail.astype("<u2").tobytes()


def rans_encoded(symbols: Any, states: Any, frequency: Any, start: Any, bits: int, words: Any) -> int:
    """Code symbols, the last one first, and fill `words` from its end; returns how many. Compiled by numba."""
    lanes, used, size = len(states), 0, len(words)
    for index in range(len(symbols) - 1, -1, -1):
        lane, value = index % lanes, symbols[index]
        state, often = states[lane], frequency[value]
        if state >= often << (32 - bits):
            used += 1
            words[size - used] = state & 65535
            state >>= 16
        states[lane] = ((state // often) << bits) + state % often + start[value]
    return used


def rans_encoded_in_steps(symbols: Any, states: Any, frequency: Any, start: Any, bits: int, words: Any) -> int:
    """The same without numba: one symbol of every lane at a time."""
    lanes, used, size = len(states), 0, len(words)
    for begin in range((len(symbols) - 1) // lanes * lanes, -1, -lanes):
        value = symbols[begin : begin + lanes]
        state, often = states[: len(value)], frequency[value]
        full = np.flatnonzero(state >= often << (32 - bits))
        words[size - used - len(full) : size - used] = state[full] & 65535
        used += len(full)
        state[full] >>= 16
        state[:] = ((state // often) << bits) + state % often + start[value]
    return used
