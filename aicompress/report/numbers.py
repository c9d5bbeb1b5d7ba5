"""How numbers are written in every rendering of a report, and how sizes in bytes are read. A dash: not measured."""

from __future__ import annotations

import math
import re

from aicompress.errors import RecipeError

DASH = "–"
_SHOWN = ("B", "KB", "MB", "GB", "TB", "PB")
BYTE_UNITS = {"B": 1, "kB": 1000} | {
    f"{letter}{suffix}": step**power
    for suffix, step in (("B", 1000), ("iB", 1024))
    for power, letter in enumerate("KMGT", start=1)
}
_BYTES_IN = {unit.upper(): count for unit, count in BYTE_UNITS.items()}
_SIZE = re.compile(r"\s*((?:\d+\.?\d*|\.\d+)(?:e\d+)?)\s*([a-z]*)\s*", re.ASCII | re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """A size such as 5GB, 512MiB or 1e6, in bytes; KB, MB and GB are powers of 1000.

    Raises:
        RecipeError: not a size.
    """
    match = _SIZE.fullmatch(text)
    unit = (match[2].upper() or "B") if match is not None else ""
    if match is None or unit not in _BYTES_IN:
        raise RecipeError(f"{text!r} is not a size", "for example 500MB, 5GB or 2GiB")
    return int(float(match[1]) * _BYTES_IN[unit])


def size(count: int | None) -> str:
    """Bytes in decimal units, three significant digits: 90868376 is "90.9 MB"."""
    if count is None:
        return DASH
    power = 0
    while power < len(_SHOWN) - 1 and abs(count) >= 999.5 * 1000**power:
        power += 1
    return f"{count} B" if power == 0 else f"{_significant(count / 1000**power, 3)} {_SHOWN[power]}"


def exact_size(count: int | None) -> str:
    """Bytes for people and for diffs: "90.9 MB (90,868,376)"."""
    return size(count) if count is None or abs(count) < 1000 else f"{size(count)} ({count:,})"


def number(value: float | None, digits: int = 4) -> str:
    """A figure to `digits` significant digits; whole numbers in full."""
    if value is None:
        return DASH
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}"
    if value != 0 and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}"
    return _significant(value, digits)


def exact(value: float) -> str:
    """A figure as a gate found it: whole numbers in full, others to six significant digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def ratio(value: float | None) -> str:
    """After / before: "0.252×"."""
    return DASH if value is None else f"{number(value, 3)}×"


def spread(value: float, low: float | None, high: float | None, unit: str = "") -> str:
    """A figure with its interval, to the digits that the interval leaves: "1.0016× (1.0006 to 1.0026)"."""
    if low is None or high is None:
        return f"{number(value)}{unit}"
    if high == low:
        return f"{number(value)}{unit} ({number(low)} to {number(high)})"
    digits = min(12, max(0, 1 - math.floor(math.log10(high - low))))
    shown, least, most = (f"{each:,.{digits}f}" for each in (value, low, high))
    return f"{shown}{unit} ({least} to {most})"


def duration(seconds: float | None) -> str:
    """A wall time: "3.2 ms", "12.3 s", "4 min 12 s", "2 h 5 min"."""
    if seconds is None:
        return DASH
    if 0 < seconds < 0.9995:
        return milliseconds(1000 * seconds)
    if seconds < 99.95:
        return f"{_significant(seconds, 3)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, rest_minutes = divmod(minutes, 60)
    return f"{hours} h {rest_minutes} min" if hours else f"{minutes} min {rest} s"


def milliseconds(value: float | None) -> str:
    """A latency in milliseconds."""
    return DASH if value is None else f"{number(value, 3)} ms"


def ratio_of(after: float | None, before: float | None) -> float | None:
    """after / before; None where either is missing or `before` is zero."""
    return after / before if after is not None and before else None


def _significant(value: float, digits: int) -> str:
    """Fixed-point notation with `digits` significant digits, thousands separated."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    return f"{rounded:,.{max(0, digits - 1 - math.floor(math.log10(abs(rounded))))}f}"
