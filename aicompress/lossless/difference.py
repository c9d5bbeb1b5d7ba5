"""Reversible differences between a tensor and another one of its dtype and shape, such as a fine-tune and its base."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from aicompress.lossless.elements import Bits


class Difference(IntEnum):
    """How a tensor is stored beside another one."""

    NONE = 0  # by itself
    XOR = 1  # the bits that differ
    ORDERED = 2  # by how many numbers of the type it is away, in the order of their values


def difference(bits: Bits, reference: Bits, kind: Difference, is_float: bool) -> Bits:
    """What is stored for elements beside those of a reference."""
    if kind is Difference.XOR:
        return bits ^ reference
    if kind is Difference.ORDERED:
        return _zigzag(_order(bits, is_float) - _order(reference, is_float))
    return bits


def restored(stored: Bits, reference: Bits, kind: Difference, is_float: bool) -> Bits:
    """Undo `difference`."""
    if kind is Difference.XOR:
        return stored ^ reference
    if kind is Difference.ORDERED:
        return _unorder(_unzigzag(stored) + _order(reference, is_float), is_float)
    return stored


def _order(bits: Bits, is_float: bool) -> Bits:
    """Integers in the order of the numbers' values; of integers themselves, their bits will do."""
    if not is_float:
        return bits
    negative = _signs(bits)
    return bits ^ (negative | _top(bits))


def _unorder(order: Bits, is_float: bool) -> Bits:
    if not is_float:
        return order
    negative = ~_signs(order)
    return order ^ (negative | _top(order))


def _zigzag(distance: Bits) -> Bits:
    """Small distances of either sign as small integers: 0, -1, 1, -2 ... become 0, 1, 2, 3 ..."""
    return (distance << 1) ^ _signs(distance)


def _unzigzag(stored: Bits) -> Bits:
    back: Bits = (stored >> 1) ^ (~(stored & 1) + 1).astype(stored.dtype)
    return back


def _signs(bits: Bits) -> Bits:
    """All bits of every element whose highest one is set, none of the others'."""
    signed = np.dtype(f"<i{bits.dtype.itemsize}")
    top = bits.dtype.itemsize * 8 - 1
    spread: Bits = (bits.view(signed) >> top).view(bits.dtype)
    return spread


def _top(bits: Bits) -> Bits:
    """The highest bit, as an element."""
    return np.asarray(1 << (bits.dtype.itemsize * 8 - 1), dtype=bits.dtype)
