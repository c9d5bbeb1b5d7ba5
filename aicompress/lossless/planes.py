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

_REPETITIVE = 4  # a plane that is this much smaller may be smaller still by its repetitions
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
_SAMPLE = 1 << 15  # bytes of a plane by which it is given up
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
    middle = plane[len(plane) // 2 :][:_SAMPLE]
    if is_float and len(plane) > 4 * _SAMPLE and len(_coders.literals.compress(middle.data)) >= _SAMPLE:
        return None
    shortest = _coders.literals.compress(plane.data)
    if not is_float or len(shortest) * _REPETITIVE < len(plane):
        shortest = min(shortest, _coders.repetitions.compress(plane.data), key=len)
    return shortest if len(shortest) < len(plane) else None


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
