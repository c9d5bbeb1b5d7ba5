"""A binary arithmetic coder with adaptive contexts: for tensors so small that a model in the file would cost more.

A symbol is told by yes-or-no decisions, as DeepCABAC does it (Wiedemann et al. 2020, arXiv:1907.11900): whether it is
another one than the most frequent; the side it lies on; how far away, in unary. Each decision has a context whose
probability is counted on the way. The first decision depends on the two left neighbours and on the column so far: of a
pruned layer whole columns are empty.

Where a row is an image, such as the pixels that a neuron looks at, the decisions also depend on the symbols above in
the image, and on how full the row is so far.

A stream is a byte for its kind, one that says what is looked at (nothing, the left neighbours, or from 3 on the width
of an image), the most frequent symbol, two bytes of a checksum, and the bits of the coder.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from aicompress.weights.decoding import checksum, compiled, shipped

ADAPTIVE = 0  # the first byte of a stream
CONTEXTS = 21 + 3 + 2 * 256  # of whether it is another symbol, of its side, of its distance
IN_IMAGES = 343 + 15 + 2 * 256  # the same of images


@shipped
def significance(row: int, occupied: int, left: int) -> int:
    """The context of whether a symbol is another one than the most frequent.

    Args:
        row: rows above.
        occupied: how many of them have another symbol in this column.
        left: how many of the two left neighbours are others.
    """
    share, part = 0, 0
    if row > 0:
        part = 16 * occupied // row
        share = 1 if occupied == 0 else 2 if part == 0 else 3 if part == 1 else 4 if part < 4 else 5 if part < 8 else 6
    return 3 * share + left


@shipped
def surroundings(offsets: Any, at: int, column: int, width: int) -> tuple[int, int]:
    """How many of six neighbours in an image are others, and towards which side they pull, 7 for none.

    Args:
        offsets: distances from the most frequent symbol, as far as they are known.
        at, column: the place, in all and in its row.
        width: of the image.
    """
    number, pull = 0, 7
    for place in range(6):
        back = place + 1 if place < 2 else width + place - 3 if place < 5 else 2 * width
        weight = 2 if place == 0 or place == 3 else 0 if place == 5 else 1
        if column >= back and offsets[at - back] != 0:
            number += 1
            pull += weight if offsets[at - back] > 0 else -weight
    return number, pull


@shipped
def read_decision(coder: Any, data: Any, chances: Any, uses: Any, context: int) -> int:
    """One decision of a stream.

    Args:
        coder: low and high end of the interval, the number that lies in it, the place of the next byte.
        data: the bytes.
        chances: of a yes in each context, of 2^16; each is the average of all decisions, of late ones after 400.
        uses: how often each context was used.
        context: of this decision.
    """
    low, high = coder[0], coder[1]
    middle = low + (((high - low) * chances[context]) >> 16)
    bit = 1 if coder[2] <= middle else 0
    if bit == 1:
        high = middle
    else:
        low = middle + 1
    chances[context] = min(65504, max(32, chances[context] + ((bit << 16) - chances[context]) // (uses[context] + 2)))
    uses[context] = min(400, uses[context] + 1)
    while (low ^ high) >> 24 == 0:
        low, high = (low << 8) & 0xFFFFFFFF, ((high << 8) & 0xFFFFFFFF) | 255
        coder[2] = ((coder[2] << 8) & 0xFFFFFFFF) | (data[coder[3]] if coder[3] < len(data) else 0)
        coder[3] += 1
    coder[0], coder[1] = low, high
    return bit


@shipped
def read_symbols(coder: Any, data: Any, counts: Any, look: int, out: Any, size: Any) -> None:
    """Fill `out` with distances from the most frequent symbol, row by row.

    Args:
        coder, data: of `read_decision`.
        counts: its chances and uses, and how often each column has another symbol so far.
        look: 1 where the left neighbours are looked at; the width of an image from 3 on.
        out: (rows * columns,) whole numbers.
        size: rows and columns.
    """
    chances, uses, occupied = counts
    at = 0
    for row in range(size[0]):
        last = second = filled = 0  # of the two left neighbours: -1 below the most frequent symbol, 1 above it
        for column in range(size[1]):
            left = (1 if last != 0 else 0) + (1 if second != 0 else 0)
            second, last = last, 0
            if look > 1:
                left, pull = surroundings(out, at, column, look)
                shares = significance(row, occupied[column], 0) // 3 * 7 + significance(column, filled, 0) // 3
                whether, side, far = shares * 7 + left, 343 + pull, 358
            else:
                whether, side, far = look * significance(row, occupied[column], left), 21 + look * (1 + second), 24
            if read_decision(coder, data, chances, uses, whether) == 1:
                last = 2 * read_decision(coder, data, chances, uses, side) - 1
                distance = 1
                base = far + (256 if look > 0 and left > 0 else 0)
                filled += 1
                while distance < 255 and read_decision(coder, data, chances, uses, base + distance) == 1:
                    distance += 1
                occupied[column] += 1
                out[at] = last * distance
            at += 1


@shipped
def read_adaptive(raw: Any, rows: int, columns: int) -> Any:
    """The symbols (rows, columns) of a stream of this kind.

    Raises:
        ValueError: it is damaged.
    """
    if len(raw) < 5 or raw[1] == 2:
        raise ValueError("a stream of symbols is damaged: it ends too early")
    data, number = raw[5:], (343 + 15 if raw[1] > 1 else 21 + 3) + 2 * 256
    first = int.from_bytes(data[:4].tobytes().ljust(4, b"\0"), "big")
    state: list[Any] = [
        np.array([0, 0xFFFFFFFF, first, 4]),
        np.full(number, 32768),
        np.zeros(number, dtype=np.int64),
        np.zeros(columns, dtype=np.int64),
        np.zeros(rows * columns, dtype=np.int64),
    ]
    read = compiled(read_symbols, read_decision, significance, surroundings)
    if read is None:  # lists are faster for the interpreter
        read, data, state = read_symbols, data.tolist(), [part.tolist() for part in state]
    coder, chances, uses, occupied, out = state
    read(coder, data, (chances, uses, occupied), int(raw[1]), out, (rows, columns))
    symbols = np.asarray(out, dtype=np.int64) + int(raw[2])
    if symbols.size and not 0 <= symbols.min() <= symbols.max() <= 255:
        raise ValueError("a stream of symbols is damaged: a symbol of more than a byte")
    symbols = symbols.astype(np.uint8)
    if checksum(symbols.tobytes()) != int(raw[3]) | int(raw[4]) << 8:
        raise ValueError("a stream of symbols is damaged: its checksum is another one")
    return symbols


def write_decision(coder: Any, data: Any, chances: Any, uses: Any, context: int, bit: int) -> None:
    """Write what `read_decision` reads; `data` has room for it."""
    low, high = coder[0], coder[1]
    middle = low + (((high - low) * chances[context]) >> 16)
    if bit == 1:
        high = middle
    else:
        low = middle + 1
    chances[context] = min(65504, max(32, chances[context] + ((bit << 16) - chances[context]) // (uses[context] + 2)))
    uses[context] = min(400, uses[context] + 1)
    while (low ^ high) >> 24 == 0:
        data[coder[3]] = high >> 24
        coder[3] += 1
        low, high = (low << 8) & 0xFFFFFFFF, ((high << 8) & 0xFFFFFFFF) | 255
    coder[0], coder[1] = low, high


def write_symbols(coder: Any, data: Any, counts: Any, look: int, offsets: Any, size: Any) -> None:
    """Write what `read_symbols` reads: distances from the most frequent symbol."""
    chances, uses, occupied = counts
    at = 0
    for row in range(size[0]):
        last = second = filled = 0
        for column in range(size[1]):
            left = (1 if last != 0 else 0) + (1 if second != 0 else 0)
            offset = offsets[at]
            second, last = last, 1 if offset > 0 else -1 if offset < 0 else 0
            if look > 1:
                left, pull = surroundings(offsets, at, column, look)
                shares = significance(row, occupied[column], 0) // 3 * 7 + significance(column, filled, 0) // 3
                whether, side, far = shares * 7 + left, 343 + pull, 358
            else:
                whether, side, far = look * significance(row, occupied[column], left), 21 + look * (1 + second), 24
            write_decision(coder, data, chances, uses, whether, 1 if offset != 0 else 0)
            if offset != 0:
                write_decision(coder, data, chances, uses, side, 1 if offset > 0 else 0)
                base = far + (256 if look > 0 and left > 0 else 0)
                for distance in range(1, min(abs(offset), 254) + 1):
                    write_decision(coder, data, chances, uses, base + distance, 1 if distance < abs(offset) else 0)
                occupied[column] += 1
                filled += 1
            at += 1


def centred(symbols: Any) -> tuple[int, Any, int]:
    """The most frequent symbol, every symbol's distance from it, and bytes that a stream of them fits into."""
    flat = symbols.reshape(-1)
    centre = int(np.bincount(flat, minlength=256).argmax())
    offsets = flat.astype(np.int64) - centre
    return (
        centre,
        offsets,
        64 + 2 * int(np.abs(offsets).sum() + 2 * offsets.size),
    )  # a decision takes thirteen bits at most


def write_adaptive(symbols: Any, look: int) -> bytes:
    """Write symbols (rows, columns) as `read_adaptive` reads them."""
    rows, columns = symbols.shape
    centre, offsets, room = centred(symbols)
    number = IN_IMAGES if look > 1 else CONTEXTS
    parts: list[Any] = [
        np.array([0, 0xFFFFFFFF, 0, 0]),
        np.full(number, 32768),
        np.zeros(number, dtype=np.int64),
        np.zeros(columns, dtype=np.int64),
        np.zeros(room, dtype=np.uint8),
    ]
    write = compiled(write_symbols, write_decision, significance, surroundings)
    if write is None:
        write, offsets, parts = write_symbols, offsets.tolist(), [part.tolist() for part in parts]
    coder, chances, uses, occupied, data = parts
    write(coder, data, (chances, uses, occupied), look, offsets, (rows, columns))
    # The shortest number between both ends, which differ in their first byte.
    body = bytes(data[: int(coder[3])]) + bytes([(int(coder[0]) + 0xFFFFFF) >> 24])
    return bytes([ADAPTIVE, look, centre]) + checksum(symbols.tobytes()).to_bytes(2, "little") + body
