"""The elements of a tensor's bytes as unsigned integers: their width, and whether they have a sign and an exponent.

Everything here maps bit patterns one to one: NaN payloads, negative zeros and subnormal numbers stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[Any]  # elements: unsigned integers of 1, 2, 4 or 8 bytes


@dataclass(frozen=True)
class Element:
    """What the bytes of a tensor are made of.

    Attributes:
        width: bytes of an element: 1, 2, 4 or 8.
        is_float: whether its highest bit is a sign and the next ones an exponent.
    """

    width: int
    is_float: bool = False

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The unsigned integer of its width."""
        return np.dtype(f"<u{self.width}")


BYTE = Element(1)
FLOAT16 = Element(2, is_float=True)
FLOAT32 = Element(4, is_float=True)
ELEMENTS = {
    **dict.fromkeys(("F64",), Element(8, is_float=True)),
    **dict.fromkeys(("F32", "C64"), FLOAT32),
    **dict.fromkeys(("F16", "BF16"), FLOAT16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), Element(1, is_float=True)),
    **dict.fromkeys(("I64", "U64"), Element(8)),
    **dict.fromkeys(("I32", "U32"), Element(4)),
    **dict.fromkeys(("I16", "U16"), Element(2)),
}


def element_of(dtype: str) -> Element:
    """The element of a safetensors dtype; bytes where it is narrower, or not known."""
    return ELEMENTS.get(dtype, BYTE)


def rotated(bits: Bits) -> Bits:
    """Rotate the sign bit to the lowest place, so that the highest byte of a number is all exponent."""
    top = bits.dtype.itemsize * 8 - 1
    turned = bits << 1
    turned |= bits >> top
    return turned


def unrotated(bits: Bits) -> Bits:
    """Undo `rotated`."""
    top = bits.dtype.itemsize * 8 - 1
    turned = bits >> 1
    turned |= bits << top
    return turned


def planes(bits: Bits) -> list[NDArray[np.uint8]]:
    """The bytes of elements, lowest ones first: one array for each byte of an element."""
    return [(bits >> (8 * place)).astype(np.uint8) for place in range(bits.dtype.itemsize)]


def joined(parts: list[NDArray[np.uint8]]) -> Bits:
    """Undo `planes`."""
    dtype = np.dtype(f"<u{len(parts)}")
    bits: Bits = parts[0].astype(dtype)
    for place, part in enumerate(parts[1:], start=1):
        wide = part.astype(dtype)
        wide <<= 8 * place
        bits |= wide
    return bits
