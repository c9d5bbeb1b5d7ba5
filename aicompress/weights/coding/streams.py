"""Read streams of symbols that were coded with static models: range asymmetric numeral systems (rANS, Duda 2013).

A stream is a byte that says how it is coded, and then, of static models: their precision in bits; the number of buckets
of columns, and where there are several each column's bucket, four bits each; for each bucket its model, the states of
its lanes, and 16-bit words. Symbol i of a bucket, row by row, belongs to lane i % lanes, so that a step decodes one
symbol of every lane at once (Giesen 2014, arXiv:1402.3392). A lane starts in the state that its encoder ended in and
has to come back to where that began, which damage does not let it.

A pruned matrix may be told by its rows and columns that hold anything but the most frequent symbol: after the byte that
says so that symbol, two bytes of a checksum, the length of a stream of the places, that stream, and one of the rest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from aicompress.weights.coding.adaptive import ADAPTIVE, read_adaptive
from aicompress.weights.coding.mixed import MIXED, read_mixed
from aicompress.weights.coding.quantizers import TRELLIS, trellis_decoded, trellis_decoded_in_steps
from aicompress.weights.decoding import LANES, NEXT_STATE, SYMBOLS_PER_BYTE, checksum, compiled, count_at, shipped

STATIC, PACKED_STATIC = 1, 2  # the first byte of a stream; packed: eight symbols of one bit are coded as one
WITHIN = 5  # the same of a stream of the rows and columns that are not empty
BUCKETS = 16  # of columns, at most: a column's takes four bits


@shipped
def read_stream(stream: Tensor, rows: int, columns: int) -> Tensor:
    """The symbols (rows, columns) uint8 of a stream.

    Raises:
        ValueError: it is damaged, or cannot hold so many.
    """
    raw = np.frombuffer(stream.detach().cpu().contiguous().numpy().tobytes(), dtype=np.uint8)
    if rows < 0 or columns < 0 or rows * columns > SYMBOLS_PER_BYTE * len(raw):
        raise ValueError(f"a stream of {len(raw)} bytes cannot hold {rows} × {columns} symbols")
    kind = int(raw[0]) if len(raw) else -1
    if kind == 0:
        symbols = read_adaptive(raw, rows, columns)
    elif kind == 1:
        symbols = read_static(raw, rows, columns)
    elif kind == 2:
        packed = read_static(raw, 1, -(-rows * columns // 8))
        symbols = np.unpackbits(packed.reshape(-1), bitorder="little")[: rows * columns]
    elif kind == 3:
        symbols = read_static(raw, rows, columns, 2)
    elif kind == 4:
        symbols = read_mixed(raw, rows, columns)
    elif kind == 5:
        symbols = read_within(raw, rows, columns)
    else:
        raise ValueError("a stream of symbols is damaged, or of a newer aicompress")
    return torch.from_numpy(symbols.reshape(rows, columns)).to(stream.device)


@shipped
def read_within(raw: Any, rows: int, columns: int) -> Any:
    """The symbols (rows, columns) of a stream of the rows and columns that are not empty."""
    length, at = count_at(raw, 4)
    end = at + length
    if end >= len(raw) or raw[end] == 5:
        raise ValueError("a stream of symbols is damaged: it ends too early")
    filled = read_stream(torch.from_numpy(raw[at:end].copy()), 1, rows + columns).numpy().reshape(-1) != 0
    places = np.ix_(filled[:rows], filled[rows:])
    symbols = np.full((rows, columns), raw[1], dtype=np.uint8)
    inner = symbols[places].shape
    symbols[places] = read_stream(torch.from_numpy(raw[end:].copy()), inner[0], inner[1]).numpy()
    if checksum(symbols.tobytes()) != int(raw[2]) | int(raw[3]) << 8:
        raise ValueError("a stream of symbols is damaged: its checksum is another one")
    return symbols


@shipped
def read_static(raw: Any, rows: int, columns: int, models: int = 1) -> Any:
    """The symbols (rows, columns) of a stream with static models: one for a bucket, or two of a trellis."""
    bits, buckets, bucket, at = read_head(raw, columns)
    symbols = np.empty(rows * columns, dtype=np.uint8)
    begin = 0
    for number in range(buckets):
        end = begin + rows * int((bucket == number).sum())
        at = read_bucket(raw, at, bits, models, symbols[begin:end].reshape(rows, -1))
        begin = end
    if raw[at:].any():
        raise ValueError("a stream of symbols is damaged: something follows its end")
    return symbols if buckets == 1 else in_their_columns(symbols, bucket, rows)


@shipped
def read_head(raw: Any, columns: int) -> tuple[int, int, Any, int]:
    """What a stream with static models begins with.

    Returns:
        The precision in bits, how many buckets there are, that of each column, and where the first one begins.
    """
    if len(raw) < 3 or not 1 <= raw[1] <= 16 or not 1 <= raw[2] <= 16:
        raise ValueError("a stream of symbols is damaged: no such models")
    bits, buckets, at = int(raw[1]), int(raw[2]), 3
    bucket = np.zeros(columns, dtype=np.uint8)
    if buckets > 1:
        pairs, at = raw[at : at + -(-columns // 2)], at + -(-columns // 2)
        bucket = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1)[:columns]
    if len(bucket) != columns or (columns and bucket.max() >= buckets):
        raise ValueError("a stream of symbols is damaged: columns of no bucket")
    return bits, buckets, bucket, at


@shipped
def in_their_columns(symbols: Any, bucket: Any, rows: int) -> Any:
    """The symbols of one bucket after the other as a matrix (rows, columns)."""
    columns, buckets = len(bucket), int(bucket.max()) + 1
    width = np.bincount(bucket, minlength=buckets)
    first = np.empty(columns, dtype=np.int64)  # where a column's first symbol is; the next one is `stride` further
    for number in range(buckets):
        first[bucket == number] = rows * int(width[:number].sum()) + np.arange(width[number])
    stride, matrix = width[bucket], np.empty((rows, columns), dtype=np.uint8)
    gather = compiled(in_columns)
    if gather is not None:
        gather(symbols, first, stride, matrix)
    else:
        for row in range(rows):
            matrix[row] = symbols[first + row * stride]
    return matrix


@shipped
def in_columns(symbols: Any, first: Any, stride: Any, matrix: Any) -> None:
    """Put the symbols of all buckets into their columns. Compiled by numba."""
    for row in range(matrix.shape[0]):
        for column in range(matrix.shape[1]):
            matrix[row, column] = symbols[first[column] + row * stride[column]]


@shipped
def read_bucket(raw: Any, at: int, bits: int, models: int, out: Any) -> int:
    """Decode the symbols of one bucket into `out` (rows, columns); returns where the next one begins."""
    states, words, tables, middle = read_bucket_head(raw, at, bits, models)
    end = middle + 2 * words
    if end > len(raw) or (models == 2 and out.shape[1] % len(states)):
        raise ValueError("a stream of symbols is damaged: it ends too early")
    used = decode_symbols(states, raw[middle:end], tables, bits, out)
    if used != words or bool((states != 1 << 16).any()):
        raise ValueError("a stream of symbols is damaged: it does not end where it began")
    return end


@shipped
def read_bucket_head(raw: Any, at: int, bits: int, models: int) -> tuple[Any, int, Any, int]:
    """What a bucket begins with.

    Returns:
        The states of its lanes, how many words it has, its models as tables, and where the words begin.
    """
    lanes, at = count_at(raw, at)
    words, at = count_at(raw, at)
    first, at = read_model(raw, at, bits)
    second, at = read_model(raw, at, bits) if models == 2 else (first, at)
    middle = at + 4 * lanes
    if not 1 <= lanes <= LANES or middle > len(raw):
        raise ValueError("a stream of symbols is damaged: it ends too early")
    states = np.frombuffer(raw[at:middle].tobytes(), dtype="<u4").astype(np.int64)
    tables = [(np.repeat(np.arange(256, dtype=np.uint8), f), f, np.cumsum(f) - f) for f in (first, second)[:models]]
    return states, words, tables, middle


@shipped
def decode_symbols(states: Any, raw: Any, tables: Any, bits: int, out: Any) -> int:
    """Decode symbols into `out`, by the models of one or two quantizers; returns how many of the words are used.

    Args:
        states: of the lanes, of which the first one has the first symbol; they become those after the last one.
        raw: the words, in bytes.
        tables, bits: of the bucket.
        out: (rows, columns); of a trellis the rows begin where its states do.
    """
    stream = np.frombuffer(raw.tobytes(), dtype="<u2").astype(np.uint16)
    if len(tables) == 1:
        plain = compiled(rans_decoded) or rans_decoded_in_steps
        symbol, frequency, start = tables[0]
        return int(plain(states, stream, symbol, frequency, start, bits, out.reshape(-1)))
    dependent = compiled(trellis_decoded) or trellis_decoded_in_steps
    symbol, frequency, start = (np.stack(pair) for pair in zip(*tables, strict=True))
    follow = np.array(NEXT_STATE, dtype=np.int64).reshape(-1)
    return int(dependent(states, stream, symbol, frequency, start, bits, follow, out))


@shipped
def read_model(raw: Any, at: int, bits: int) -> tuple[Any, int]:
    """How often each of 256 symbols occurs among 2^bits: the first one, how many follow, their counts but the last."""
    if at + 2 > len(raw):
        raise ValueError("a stream of symbols is damaged: it ends too early")
    first, more, at = int(raw[at]), int(raw[at + 1]), at + 2
    frequency, left = np.zeros(256, dtype=np.int64), 1 << bits
    for symbol in range(first, first + more):
        count, at = count_at(raw, at)
        left -= count
        if left <= 0 or symbol > 254:
            raise ValueError("a stream of symbols is damaged: no such model")
        frequency[symbol] = count
    frequency[first + more] = left
    return frequency, at


@shipped
def rans_decoded(states: Any, words: Any, symbol: Any, frequency: Any, start: Any, bits: int, out: Any) -> int:
    """Fill `out` with symbols; returns how many words are read, or -1 where there are too few. Compiled by numba."""
    lanes, position, mask = len(states), 0, (1 << bits) - 1
    for begin in range(0, len(out), lanes):
        for lane in range(min(lanes, len(out) - begin)):
            state = states[lane]
            slot = state & mask
            value = symbol[slot]
            out[begin + lane] = value
            state = frequency[value] * (state >> bits) + slot - start[value]
            if state < 65536:
                if position >= len(words):
                    return -1
                state = (state << 16) | words[position]
                position += 1
            states[lane] = state
    return position


@shipped
def rans_decoded_in_steps(states: Any, words: Any, symbol: Any, frequency: Any, start: Any, bits: int, out: Any) -> int:
    """The same without numba: one symbol of every lane at a time."""
    lanes, position, mask = len(states), 0, (1 << bits) - 1
    for begin in range(0, len(out), lanes):
        state = states[: min(lanes, len(out) - begin)]
        slot = state & mask
        value = symbol[slot]
        out[begin : begin + lanes] = value
        state[:] = frequency[value] * (state >> bits) + slot - start[value]
        low = np.flatnonzero(state < 65536)
        if position + len(low) > len(words):
            return -1
        state[low] = (state[low] << 16) | words[position : position + len(low)]
        position += len(low)
    return position


__all__ = ["ADAPTIVE", "BUCKETS", "MIXED", "PACKED_STATIC", "STATIC", "TRELLIS", "WITHIN", "read_stream"]
