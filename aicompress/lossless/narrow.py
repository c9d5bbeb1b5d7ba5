"""Find float32 numbers that a narrower type holds exactly, and store them in it."""

from __future__ import annotations

import numpy as np

from aicompress.lossless.elements import Bits

_UPPER = 16  # bits of a float32 below those that a bfloat16 has
_BELOW_HALF = 0x1FFF  # bits of a float32 that are zero in every float16
_EXPONENT = 0x7F800000


def lowest_bits(*arrays: Bits) -> int:
    """All bits that any element has set."""
    together = 0
    for bits in arrays:
        together |= int(np.bitwise_or.reduce(bits, initial=0))
    return together


def is_upper(lowest: int) -> bool:
    """Whether float32 numbers with these bits are all bfloat16 numbers: the lower half of each is zero."""
    return not lowest & 0xFFFF


def upper(bits: Bits) -> Bits:
    """The bfloat16 numbers of float32 ones whose lower halves are zero."""
    return (bits >> _UPPER).astype(np.uint16)


def from_upper(bits: Bits) -> Bits:
    """Undo `upper`."""
    wide: Bits = bits.astype(np.uint32)
    wide <<= _UPPER
    return wide


def half(bits: Bits, lowest: int) -> Bits | None:
    """The float16 numbers of float32 ones; None where one is none.

    Nor where one is infinite or NaN: processors may change the bits of NaN in between.

    Args:
        bits: of the float32 numbers.
        lowest: what `lowest_bits` gives for them.
    """
    if lowest & _BELOW_HALF or not (bits & _EXPONENT != _EXPONENT).all():
        return None
    with np.errstate(over="ignore", under="ignore"):
        narrow: Bits = bits.view(np.float32).astype(np.float16).view(np.uint16)
    return narrow if (from_half(narrow) == bits).all() else None


def from_half(bits: Bits) -> Bits:
    """Undo `half`."""
    wide: Bits = bits.view(np.float16).astype(np.float32).view(np.uint32)
    return wide
