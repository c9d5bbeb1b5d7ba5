"""A binary arithmetic coder whose chances are mixed from several contexts: for sparse tensors that are small.

A symbol is told by the decisions of `coding.adaptive`. Here every decision has a chance in each of several contexts,
and what is coded is a logistic mixture of these, whose weights are learnt on the way (Mahoney 2005, "Adaptive weighing
of context models for lossless data compression", section 2):

    p = σ(Σ wᵢ ln(pᵢ / (1 - pᵢ))),   wᵢ ← wᵢ + η (bit - p) ln(pᵢ / (1 - pᵢ))

All of it is done in whole numbers, so that every machine reads the same. The contexts of whether a symbol is another
one than the most frequent are neighbours to the left and, in an image, above; how full the column, the row and the
columns around are so far; and the column itself.

A stream is a byte for its kind, one for the width of an image or 0, the most frequent symbol, two bytes of a checksum,
and the bits of the coder.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from aicompress.weights.coding.adaptive import centred
from aicompress.weights.decoding import checksum, compiled, shipped

MIXED = 4  # the first byte of a stream


@shipped
def level(part: int, whole: int) -> int:
    """A share in twelve steps that grow by half: 0 for none, 11 for a third and more."""
    if part == 0 or whole == 0:
        return 0
    step, bound, share = 1, 1, 256 * part // whole
    while step < 11 and share >= bound:
        step, bound = step + 1, bound + (bound + 1) // 2
    return step


@shipped
def mixed_decision(coder: Any, data: Any, model: Any, place: int, number: int, bit: int) -> int:
    """Read one decision, or write it, and learn from it; returns it.

    Args:
        coder: low and high end of the interval, the number that lies in it, the place of the next byte, and whether
            bits are written.
        data: the bytes.
        model: chances of a yes in each context, of 2^16, and how often each was used; weights of 2^16; the contexts
            of this decision; ln(p / (1 - p)) of 2^8 by p of 2^14, and p of 2^16 by that from -12 on.
        place, number: of the first weight, and how many there are.
        bit: the decision where it is written.
    """
    chances, uses, weights, picked, stretch, squash = model
    total = 0
    for each in range(number):
        total += weights[place + each] * stretch[chances[picked[each]] >> 2]
    chance = squash[min(6144, max(0, (total >> 16) + 3072))]
    low, high = coder[0], coder[1]
    middle = low + (((high - low) * chance) >> 16)
    if coder[4] == 0:
        bit = 1 if coder[2] <= middle else 0
    if bit == 1:
        high = middle
    else:
        low = middle + 1
    off = (bit << 16) - chance
    for each in range(number):
        context = picked[each]
        own = chances[context]
        weights[place + each] += (off * stretch[own >> 2]) >> 16
        chances[context] = min(65504, max(32, own + 2 * ((bit << 16) - own) // (2 * uses[context] + 3)))
        uses[context] = min(255, uses[context] + 1)
    while (low ^ high) >> 24 == 0:
        if coder[4] == 1:
            data[coder[3]] = high >> 24
        low, high = (low << 8) & 0xFFFFFFFF, ((high << 8) & 0xFFFFFFFF) | 255
        if coder[4] == 0:
            coder[2] = ((coder[2] << 8) & 0xFFFFFFFF) | (data[coder[3]] if coder[3] < len(data) else 0)
        coder[3] += 1
    coder[0], coder[1] = low, high
    return bit


@shipped
def side(value: int) -> int:
    """-1, 0 or 1."""
    return 1 if value > 0 else -1 if value < 0 else 0


@shipped
def code_distance(coder: Any, data: Any, model: Any, near: Any, given: int) -> int:
    """Read or write how far a symbol is, of 1 and more.

    Args:
        near: what the contexts are: whether neighbours are others, how far they are, how far those of the column and
            of the row are on average.
        given: the distance where it is written.
    """
    picked, distance = model[3], 1
    while distance < 255:
        base = 8192 + 1024 + 32 * min(distance, 20)
        picked[0] = base + near[0]
        picked[1] = base + 1024 + near[1]
        picked[2] = base + 2048 + near[2]
        picked[3] = base + 3072 + near[3]
        if mixed_decision(coder, data, model, 56, 4, 1 if given > distance else 0) == 0:
            return distance
        distance += 1
    return distance


@shipped
def mean_level(total: int, number: int) -> int:
    """A mean distance in five steps."""
    if number == 0:
        return 1
    mean = 10 * total // number
    return 0 if mean < 12 else 1 if mean < 16 else 2 if mean < 22 else 3 if mean < 35 else 4


@shipped
def fullness(occupied: Any, column: int, row: int, width: int, across: int) -> int:
    """How full a column is behind so many rows; of an image, with the eight around it, and itself twice."""
    if width == 0:
        return level(occupied[column], row)
    total = occupied[column]
    for down in range(-width, width + 1, width):
        for right in range(-1, 2):
            if 0 <= column + down + right < across:
                total += occupied[column + down + right]
    return level(total, 10 * row)


@shipped
def code_symbols(coder: Any, data: Any, model: Any, columns: Any, width: int, out: Any, size: Any) -> None:
    """Read distances from the most frequent symbol into `out`, row by row, or write those that are there.

    Args:
        coder, data, model: of `mixed_decision`.
        columns: for each column how many others it has, the sum of their distances and of their sides so far, and how
            full it and its surroundings are.
        width: of an image, or 0.
        out: (rows * columns,) whole numbers.
        size: rows and columns.
    """
    occupied, distances, sides, around = columns
    picked, across = model[3], size[1]
    for row in range(size[0]):
        for column in range(across):
            around[column] = fullness(occupied, column, row, width, across)
        filled = far = lean = 0
        for column in range(across):
            at = row * across + column
            left = out[at - 1] if column >= 1 else 0
            second = out[at - 2] if column >= 2 else 0
            up = out[at - width] if 0 < width <= column else 0
            up_left = out[at - width - 1] if 0 < width < column else 0
            up_right = out[at - width + 1] if 0 < width <= column + 1 and width > 1 else 0
            above = out[at - 2 * width] if width > 0 and column >= 2 * width else 0
            last = out[at - across] if row >= 1 else 0
            before = out[at - 2 * across] if row >= 2 else 0
            pattern = (left != 0) + 2 * (second != 0) + 4 * (up != 0) + 8 * (up_left != 0) + 16 * (up_right != 0)
            pattern += 32 * (above != 0)
            others = (left != 0) + (second != 0) + (up != 0) + (up_left != 0) + (up_right != 0) + (above != 0)
            full = level(10 * filled + 3, 10 * column + 80)
            picked[0] = (12 * level(occupied[column], row) + level(filled, column)) * 7 + others
            picked[1] = 1100 + pattern
            picked[2] = 1200 + 12 * around[column] + full
            picked[3] = 1400 + 4 * min(30, occupied[column]) + (last != 0) + 2 * (before != 0)
            picked[4] = 1600 + 8 * around[column] + others
            picked[5] = 1700 + 8 * full + min(5, abs(left) + abs(up))
            picked[6] = 14336 + column
            offset = out[at]
            if mixed_decision(coder, data, model, 7 * others, 7, 1 if offset != 0 else 0) == 1:
                pull = 2 * side(left) + side(second) + 2 * side(up) + side(up_left) + side(up_right)
                picked[0] = 8192 + 7 + pull
                picked[1] = 8224 + 9 * side(left) + 3 * side(up) + side(last) + 13
                picked[2] = 8256 + min(3, max(-3, sides[column])) + 3
                picked[3] = 8272 + min(4, max(-4, lean)) + 4
                which = 2 * mixed_decision(coder, data, model, 49, 4, 1 if offset > 0 else 0) - 1
                beside = abs(left) + abs(up) + (abs(up_left) + abs(up_right) + abs(second)) // 2
                means = mean_level(distances[column], occupied[column]), mean_level(far, filled)
                near = (1 if others > 0 else 0, min(9, beside), means[0], means[1])
                distance = code_distance(coder, data, model, near, abs(offset))
                out[at] = which * distance
                filled, far, lean = filled + 1, far + distance, lean + which
                occupied[column] += 1
                distances[column] += distance
                sides[column] += which


@shipped
def code_mixed(data: Any, out: Any, width: int, rows: int, columns: int, writing: int) -> tuple[Any, Any]:
    """Run the coder over all symbols; returns its state, and distances from the most frequent symbol.

    Args:
        data: bytes to read, or room for those that are written.
        out: (rows * columns,) distances that are written; zeros where they are read.
    """
    first = int.from_bytes(bytes(data[:4]).ljust(4, b"\0"), "big")
    chances = np.concatenate([np.full(8192, 3932), np.full(1024, 32768), np.full(5120, 26214), np.full(columns, 3932)])
    odds = (np.arange(16384) + 0.5) / 16384
    stretch = np.rint(256 * np.log(odds / (1 - odds))).astype(np.int64)
    squash = np.rint(65536 / (1 + np.exp(-np.arange(-3072, 3073) / 256))).astype(np.int64).clip(16, 65520)
    state: list[Any] = [
        np.array([0, 0xFFFFFFFF, first, 0 if writing else 4, writing]),
        data,
        chances,
        np.zeros(len(chances), dtype=np.int64),
        np.concatenate([np.full(49, 13107), np.full(11, 19661)]),
        np.zeros(8, dtype=np.int64),
        stretch,
        squash,
        *(np.zeros(columns, dtype=np.int64) for _ in range(4)),
        out,
    ]
    run = compiled(code_symbols, fullness, code_distance, mixed_decision, mean_level, level, side)
    if run is None:  # lists are faster for the interpreter
        run, state = code_symbols, [part.tolist() for part in state]
    run(state[0], state[1], tuple(state[2:8]), tuple(state[8:12]), width, state[12], (rows, columns))
    return state[0], (state[1] if writing else np.asarray(state[12], dtype=np.int64))


@shipped
def read_mixed(raw: Any, rows: int, columns: int) -> Any:
    """The symbols (rows, columns) of a stream of this kind.

    Raises:
        ValueError: it is damaged.
    """
    if len(raw) < 5 or 0 < raw[1] < 3:
        raise ValueError("a stream of symbols is damaged: it ends too early")
    out = np.zeros(rows * columns, dtype=np.int64)
    _, offsets = code_mixed(raw[5:].copy(), out, int(raw[1]), rows, columns, 0)
    symbols = offsets + int(raw[2])
    if symbols.size and not 0 <= symbols.min() <= symbols.max() <= 255:
        raise ValueError("a stream of symbols is damaged: a symbol of more than a byte")
    symbols = symbols.astype(np.uint8)
    if checksum(symbols.tobytes()) != int(raw[3]) | int(raw[4]) << 8:
        raise ValueError("a stream of symbols is damaged: its checksum is another one")
    return symbols


def write_mixed(symbols: Any, width: int) -> bytes:
    """Write symbols (rows, columns) as `read_mixed` reads them."""
    rows, columns = symbols.shape
    centre, offsets, room = centred(symbols)
    coder, data = code_mixed(np.zeros(room, dtype=np.uint8), offsets, width, rows, columns, 1)
    body = bytes(data[: int(coder[3])]) + bytes([(int(coder[0]) + 0xFFFFFF) >> 24])
    return bytes([MIXED, width, centre]) + checksum(symbols.tobytes()).to_bytes(2, "little") + body
