"""Code one chunk of a tensor's bytes so that it can be decoded by itself.

A coded chunk begins with a byte: how it is laid out (low half), and what it is the difference to (high half). RAW is
followed by the bytes as they are; SAME by nothing, since they are the reference's. PLANES, UPPER and HALF are followed
by the length of every byte plane (u32, lowest plane first, the highest bit set where a plane is stored as it is) and by
the planes: of the elements themselves, or of the bfloat16 or float16 numbers that float32 ones are exactly.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from aicompress.lossless import narrow
from aicompress.lossless import planes as coder
from aicompress.lossless.difference import Difference, difference, restored
from aicompress.lossless.elements import FLOAT16, FLOAT32, Bits, Element, joined, planes, rotated, unrotated

CHUNK = 1 << 19  # bytes of a tensor that are coded at a time; what is made of them stays in a cache
Buffer = bytes | memoryview | NDArray[np.uint8]
_AS_IT_IS = 1 << 31


class Layout(IntEnum):
    """What a coded chunk holds."""

    RAW = 0
    PLANES = 1
    UPPER = 2
    HALF = 3
    SAME = 4


def encode(
    chunk: Buffer, element: Element, reference: Buffer | None = None, kind: Difference = Difference.NONE
) -> bytes:
    """Code a chunk; never longer than it is by more than a byte.

    Args:
        chunk: a whole number of elements.
        element: what it is made of.
        reference: the same part of another tensor, of the same size.
        kind: how to store the difference to that.
    """
    bits = _bits(chunk, element)
    other = None if reference is None else _bits(reference, element)
    if other is not None and np.array_equal(bits, other):
        return bytes([Layout.SAME])
    coded = _coded(bits, None if kind is Difference.NONE else other, element, kind)
    return coded if len(coded) <= bits.nbytes else bytes([Layout.RAW]) + bits.tobytes()


def best_difference(pairs: Sequence[tuple[Buffer, Buffer]], element: Element) -> Difference:
    """The difference by which parts of a tensor, each beside that of a reference, are coded shortest."""
    return min(Difference, key=lambda kind: sum(len(encode(part, element, other, kind)) for part, other in pairs))


def _coded(bits: Bits, reference: Bits | None, element: Element, kind: Difference) -> bytes:
    """A chunk as planes, in the narrowest type that holds it."""
    layout, bits, reference, element = _narrowed(bits, reference, element)
    stored = bits if reference is None else difference(bits, reference, kind, element.is_float)
    turned = rotated(stored) if _turns(element, kind) else stored
    coded = [(plane, coder.encode(plane, element.is_float)) for plane in planes(turned)]
    lengths = [len(plane) | _AS_IT_IS if code is None else len(code) for plane, code in coded]
    parts = [plane.data if code is None else code for plane, code in coded]
    return b"".join((bytes([layout | kind << 4]), struct.pack(f"<{len(lengths)}I", *lengths), *parts))


def decode(
    coded: bytes | memoryview, size: int, element: Element, reference: Buffer | None = None
) -> NDArray[np.uint8]:
    """Undo `encode`; takes no more memory than some chunks of `size` bytes.

    Raises:
        ValueError: it is no code of a chunk of that size.
    """
    if not len(coded):
        raise ValueError("a chunk is empty")
    layout, kind = Layout(coded[0] & 15), Difference(coded[0] >> 4)
    body = memoryview(coded)[1:]
    if layout is Layout.RAW:
        if len(body) != size:
            raise ValueError("a chunk has another size")
        return np.frombuffer(body, dtype=np.uint8)
    if reference is None and (layout is Layout.SAME or kind is not Difference.NONE):
        raise ValueError("a chunk is the difference to something that is not there")
    if layout is Layout.SAME and reference is not None:
        return _bytes(_bits(reference, element))
    if layout is not Layout.PLANES and element != FLOAT32:
        raise ValueError("a chunk of these elements cannot be narrower")
    stored = FLOAT16 if layout is not Layout.PLANES else element
    bits = joined(_planes(body, size // element.width, stored.width))
    bits = unrotated(bits) if _turns(stored, kind) else bits
    if reference is not None and kind is not Difference.NONE:
        other = _bits(reference, element)
        bits = restored(bits, narrow.upper(other) if layout is Layout.UPPER else other, kind, stored.is_float)
    return _bytes(_widened(bits, layout))


def _planes(body: memoryview, count: int, width: int) -> list[NDArray[np.uint8]]:
    """The decoded planes of so many elements.

    Raises:
        ValueError: they have other sizes.
    """
    if len(body) < 4 * width:
        raise ValueError("a chunk ends early")
    lengths = struct.unpack_from(f"<{width}I", body)
    parts, begin = [], 4 * width
    for length in lengths:
        nbytes = length & ~_AS_IT_IS
        part = body[begin : begin + nbytes]
        if len(part) != nbytes or (length & _AS_IT_IS and nbytes != count):
            raise ValueError("a plane ends early")
        plane = part if length & _AS_IT_IS else coder.decode(part, count)
        parts.append(np.frombuffer(plane, dtype=np.uint8))
        begin += nbytes
    if begin != len(body):
        raise ValueError("a chunk is too long")
    return parts


def _narrowed(bits: Bits, reference: Bits | None, element: Element) -> tuple[Layout, Bits, Bits | None, Element]:
    """Elements in the narrowest type that holds them, and the reference with them."""
    if element != FLOAT32:
        return Layout.PLANES, bits, reference, element
    lowest = narrow.lowest_bits(bits, *([] if reference is None else [reference]))
    if narrow.is_upper(lowest):
        return Layout.UPPER, narrow.upper(bits), None if reference is None else narrow.upper(reference), FLOAT16
    halves = narrow.half(bits, lowest) if reference is None else None
    if halves is not None:
        return Layout.HALF, halves, None, FLOAT16
    return Layout.PLANES, bits, reference, element


def _widened(bits: Bits, layout: Layout) -> Bits:
    """Undo `_narrowed`."""
    if layout is Layout.UPPER:
        return narrow.from_upper(bits)
    return narrow.from_half(bits) if layout is Layout.HALF else bits


def _turns(element: Element, kind: Difference) -> bool:
    """Whether the sign bit moves away from the exponent; a distance has none."""
    return element.is_float and element.width > 1 and kind is not Difference.ORDERED


def _bits(chunk: Buffer, element: Element) -> Bits:
    bits: Bits = np.frombuffer(chunk, dtype=element.dtype)
    return bits


def _bytes(bits: Bits) -> NDArray[np.uint8]:
    return bits.view(np.uint8)
