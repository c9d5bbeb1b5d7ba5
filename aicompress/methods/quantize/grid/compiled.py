"""Round to nearest in three passes over a weight as it is stored, compiled by numba where that is installed.

`rounding` takes a pass of torch for each operation, over float32, and the interpreter's lock between any two: threads
wait for each other more than for memory. These passes give the same codes to the bit, and the error on the way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aicompress.methods.quantize.grid.rounding import code_range
from aicompress.weights.stored.int_grouped import groups_of

Array = NDArray[Any]
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # that hold eight codes
_LOADING = threading.Lock()
_SIGN = np.int32(0x7FFFFFFF)


def _ranges(stored: Array, shift: int, size: int, low: Array, high: Array) -> None:
    """Least and largest value of each group, zero included, as the bits of float32.

    Floats order as these integers do once the others of a negative one's bits are turned round; NaN lies outside.
    """
    wide = np.empty(stored.shape[1], np.int32)
    for r in range(stored.shape[0]):
        row = stored[r]
        for c in range(row.size):
            bits = np.int32(np.uint32(row[c]) << shift)
            wide[c] = bits ^ (bits >> 31 & _SIGN)
        for g in range(low.shape[1]):
            part = wide[g * size : (g + 1) * size]
            least = most = np.int32(0)
            for c in range(part.size):
                least = min(least, part[c])
                most = max(most, part[c])
            low[r, g] = least ^ (least >> 31 & _SIGN)
            high[r, g] = most ^ (most >> 31 & _SIGN)


def _codes(
    stored: Array, shift: int, size: int, grids: tuple[Array, Array], ends: tuple[Any, Any], out: tuple[Array, Array]
) -> None:
    """q = round(w / s + z) within the ends; adds Σ (w − (q − z) s)² and Σ w² to the sums."""
    scale, zero = grids
    lowest, highest = ends
    codes, sums = out
    wide = np.empty(stored.shape[1], np.uint32)
    values = wide.view(np.float32)
    for r in range(stored.shape[0]):
        row = stored[r]
        for c in range(row.size):
            wide[c] = np.uint32(row[c]) << shift
        error = norm = np.float32(0)
        for g in range(scale.shape[1]):
            step, moved = scale[r, g], zero[r, g]
            part = values[g * size : (g + 1) * size]
            to = codes[r, g * size : (g + 1) * size]
            for c in range(part.size):
                value = part[c]
                code = np.rint(value / step + moved)
                code = lowest if code < lowest else code
                code = highest if code > highest else code
                missed = value - (code - moved) * step
                error += missed * missed
                norm += value * value
                to[c] = np.int8(code)
        sums[0] += error
        sums[1] += norm


def _words(codes: Array, bits: int, words: Array) -> None:
    """Eight codes of one byte each, seen as a word of 64 bits -> a word of as many bits as they need."""
    one, lane, used = np.uint64(1), np.uint64(8), np.uint64(bits)
    sign = np.uint64(0x0101010101010101) << (used - one)
    pairs = ((one << used) - one) * np.uint64(0x0001000100010001)
    fours = ((one << used + used) - one) * np.uint64(0x0000000100000001)
    eights = (one << np.uint64(4) * used) - one
    for k in range(codes.size):
        word = codes[k] ^ sign  # q + 2^(b-1) in the low b bits
        word = (word & pairs) | (word >> lane & pairs) << used
        word = (word & fours) | (word >> lane + lane & fours) << used + used
        words[k] = (word & eights) | (word >> np.uint64(32) & eights) << np.uint64(4) * used


@dataclass(frozen=True)
class RoundedCodes:
    """Codes (out, in) int8, ‖W − Ŵ‖² and ‖W‖²."""

    codes: Tensor
    error: float
    norm: float


@dataclass(frozen=True)
class Kernels:
    """The compiled passes; a weight is bfloat16 or float32, (out, in); 0 columns in a group stand for whole rows."""

    ranges_of: Callable[..., None] = _ranges
    codes_of: Callable[..., None] = _codes
    words_of: Callable[..., None] = _words

    def ranges(self, matrix: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        """Least and largest value of each group, zero included: float32 (out, groups) each."""
        rows, columns = matrix.shape
        low, high = torch.empty(2, rows, groups_of(columns, group_size)).unbind()
        ends = (low.view(torch.int32).numpy(), high.view(torch.int32).numpy())
        self.ranges_of(*_stored(matrix), group_size or columns, *ends)
        return low, high

    def rounded(self, matrix: Tensor, group_size: int, bits: int, scale: Tensor, zero: Tensor | None) -> RoundedCodes:
        """Round to the nearest codes of a grid, (out, groups) each; values must be finite."""
        codes, sums = torch.empty(matrix.shape, dtype=torch.int8), np.zeros(2)
        shifts = torch.zeros(scale.shape) if zero is None else zero.float()
        lowest, highest = map(np.float32, code_range(bits))
        self.codes_of(
            *_stored(matrix),
            group_size or matrix.shape[1],
            (scale.float().numpy(), shifts.numpy()),
            (lowest, highest),
            (codes.numpy(), sums),
        )
        return RoundedCodes(codes, float(sums[0]), float(sums[1]))

    def packed(self, codes: Tensor, bits: int) -> Tensor | None:
        """(out, words) int32 bit stream of codes; None where it is not made of whole words."""
        rows, columns = codes.shape
        if bits not in _WORDS or columns % 32:
            return None
        packed = torch.empty(rows, columns * bits // 32, dtype=torch.int32)
        words = packed.view(-1).numpy().view(_WORDS[bits])
        self.words_of(codes.view(-1).numpy().view(np.uint64), bits, words)
        return packed


def _stored(matrix: Tensor) -> tuple[Array, Any]:
    """A weight's bits, and how far they are to be shifted to be those of float32."""
    if matrix.dtype is torch.bfloat16:
        return matrix.view(torch.int16).numpy().view(np.uint16), np.uint32(16)
    return matrix.view(torch.int32).numpy().view(np.uint32), np.uint32(0)


def kernels() -> Kernels | None:
    """The compiled passes; None where numba cannot be imported.

    The first call of each takes a second; later processes find the code in numba's cache, where that has a folder.
    """
    with _LOADING:
        return _loaded()


@cache
def _loaded() -> Kernels | None:
    try:
        import numba
    except ImportError:  # it is not installed, or does not go with the other packages
        return None

    def compiled(function: Callable[..., None], **options: Any) -> Any:
        options = {"nogil": True, "error_model": "numpy", **options}
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no folder for a cache
            return numba.njit(**options)(function)

    # Sums in any order, so that they can be made of vectors; nothing else may be rearranged.
    return Kernels(compiled(_ranges), compiled(_codes, fastmath={"reassoc", "nsz"}), compiled(_words))
