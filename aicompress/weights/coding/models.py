"""Static models: how often each symbol occurs, in whole parts of a power of two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PRECISIONS = (10, 12, 14, 16)  # bits of a count; tables of more do not fit the nearest cache
Counts = NDArray[Any]


@dataclass(frozen=True)
class SymbolModel:
    """A model of one bucket's symbols.

    Attributes:
        frequency: (256,) int64, of which those of symbols that occur are above 0; they add up to 2^bits.
        bits: precision.
    """

    frequency: Counts
    bits: int

    @classmethod
    def of(cls, counts: Counts, bits: int) -> SymbolModel:
        """The model of least code length, nearly, for symbols that occur so often.

        Args:
            counts: (256,), one above 0 at least.
            bits: precision; no more symbols than 2^bits occur.
        """
        whole = 1 << bits
        exact = counts * (whole / counts.sum())
        frequency = np.where(counts > 0, np.maximum(1, np.round(exact)), 0).astype(np.int64)
        while (excess := int(frequency.sum()) - whole) != 0:
            step = 1 if excess > 0 else -1
            movable = (frequency > 1) if excess > 0 else (counts > 0)
            # What one step costs in bits: n log2(f / (f - step)).
            cost = np.full(256, np.inf)
            cost[movable] = counts[movable] * np.log2(frequency[movable] / (frequency[movable] - step))
            for symbol in np.argsort(cost, kind="stable")[: min(abs(excess), int(movable.sum()))]:
                frequency[symbol] -= step
        return cls(frequency, bits)

    def cost(self, counts: Counts) -> float:
        """Bits that symbols take which occur so often."""
        present = counts > 0
        return float((counts[present] * (self.bits - np.log2(self.frequency[present]))).sum())

    def text(self) -> bytes:
        """The model as a stream has it."""
        (symbols,) = np.nonzero(self.frequency)
        first, last = int(symbols[0]), int(symbols[-1])
        return bytes([first, last - first]) + b"".join(number(int(f)) for f in self.frequency[first:last])


def number(value: int) -> bytes:
    """A number in seven bits a byte, the lowest first."""
    text = bytearray()
    while value > 127:
        text.append(value & 127 | 128)
        value >>= 7
    return bytes([*text, value])
