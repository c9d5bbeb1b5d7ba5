"""Entropy-code byte planes with Zstandard; what does not become smaller stays as it is.

The exponents of weights have about 2.6 bits of entropy in 8, and no repetitions that mean anything. A search for
matches finds short ones by chance, which cost more than they save: with a table of 64 places and matches of 7 bytes,
Zstandard codes nearly nothing but literals, by Huffman's codes, to within 2 % of the entropy. What is made of
repetitions (zeros, masks, indices) is tried with its usual search as well.
"""

from __future__ import annotations

import threading

import numpy as np
import zstandard
from numpy.typing import NDArray

_REPETITIVE = 4  # times that a plane has to shrink
_LITERALS = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    window_log=17,  # as long as a block
    hash_log=6,
    chain_log=6,
    search_log=1,
    min_match=7,
    target_length=0,
    write_content_size=True,
    write_checksum=False,
)
_SAMPLE = 1 << 15  # bytes in the middle of a plane by which the coder is chosen, or none
_LEVEL = 3  # Zstandard's own, for what has repetitions


class _Coders(threading.local):
    """Coders of one thread: each holds tables that no two threads may use at once."""

    def __init__(self) -> None:
        self.literals = zstandard.ZstdCompressor(compression_params=_LITERALS)
        self.repetitions = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False)
        self.decoder = zstandard.ZstdDecompressor()


_coders = _Coders()


def encode(plane: NDArray[np.uint8], is_float: bool) -> bytes | None:
    """Code a plane; None where it would not become smaller.

    Args:
        plane: its bytes.
        is_float: whether it is a byte of floating-point numbers, in which repetitions are rare.
    """
    coder = _coders.literals
    if len(plane) > 4 * _SAMPLE:
        middle = plane[len(plane) // 2 :][:_SAMPLE].data
        size = len(_coders.literals.compress(middle))
        if is_float and size >= _SAMPLE:
            return None
        if not is_float and len(_coders.repetitions.compress(middle)) <= size:
            coder = _coders.repetitions
    shortest = coder.compress(plane.data)
    if coder is _coders.literals and ((len(plane) <= 4 * _SAMPLE and not is_float) or _is_repetitive(shortest, plane)):
        shortest = min(shortest, _coders.repetitions.compress(plane.data), key=len)
    return shortest if len(shortest) < len(plane) else None


def _is_repetitive(coded: bytes, plane: NDArray[np.uint8]) -> bool:
    """Whether a plane has become so small that its repetitions may make it smaller still."""
    return len(coded) * _REPETITIVE < len(plane)


def decode(coded: bytes | memoryview, size: int) -> bytes:
    """Undo `encode`, in the memory of `size` bytes, whatever the code claims.

    Raises:
        ValueError: it is no code of that many bytes.
    """
    try:
        if zstandard.frame_content_size(coded) != size:
            raise ValueError("a plane has another size")
        plane: bytes = _coders.decoder.decompress(coded, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    if len(plane) != size:
        raise ValueError("a plane ends early")
    return plane
