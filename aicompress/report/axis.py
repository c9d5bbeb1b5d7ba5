"""A numeric axis of a plot: where a value lies in the picture, and which values are marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LOGARITHMIC_FROM = 20  # largest over smallest value, above which an axis is logarithmic
_STEPS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class PlotAxis:
    """An axis from the value `low` at the coordinate `start` to `high` at `end`.

    Attributes:
        low, high: the values at its ends; low < high, and both positive if it is logarithmic.
        start, end: their coordinates; end < start on a vertical axis, where the coordinates of SVG grow downwards.
        logarithmic: equal distances are equal ratios.
    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """The coordinate of a value."""
        low, high, value = (math.log(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """Round values within the axis and their labels: at most `most` of them where the axis is linear."""
        if self.logarithmic:
            return [(value, f"{value:g}") for value in self._round_powers()]
        step = _round_step((self.high - self.low) / most)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(number * step, _label(number * step, step)) for number in range(first, last + 1)]

    def _round_powers(self) -> list[float]:
        """1, 2 and 5 times the powers of ten; the powers alone, or every few of them, over many decades."""
        lowest, highest = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        factors = (1, 2, 5) if highest - lowest <= 4 else (1,)
        powers = range(lowest, highest + 1, max(1, (highest - lowest) // 10))
        values = [float(f"{factor}e{power}") for power in powers for factor in factors]
        return [value for value in values if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)]


def fitted(values: Sequence[float], ends: tuple[float, float], margin: float) -> PlotAxis:
    """A linear axis around values, with a share `margin` of their range free at either end."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    free = margin * (high - low)
    return PlotAxis(low - free, high + free, *ends)


def scaled(values: Sequence[float], ends: tuple[float, float], margin: float) -> PlotAxis:
    """An axis around values: logarithmic where they are positive and span a large factor."""
    low, high = min(values), max(values)
    if low <= 0 or high <= LOGARITHMIC_FROM * low:
        return fitted(values, ends, margin)
    free = (high / low) ** margin
    return PlotAxis(low / free, high * free, *ends, logarithmic=True)


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that is no less than `least`."""
    power = math.floor(math.log10(least))
    factor = next(factor for factor in _STEPS if factor >= least / 10**power - 1e-9)
    return float(f"{factor}e{power}")


def _label(value: float, step: float) -> str:
    """A multiple of a step, with as many decimals as the step has."""
    if not 1e-4 <= step < 1e6:
        return f"{value:.6g}"
    mantissa, _, power = f"{step:e}".partition("e")
    decimals = max(0, len(mantissa.rstrip("0").rstrip(".").partition(".")[2]) - int(power))
    return f"{value + 0.0:.{decimals}f}"  # + 0.0: a negative zero has no sign
