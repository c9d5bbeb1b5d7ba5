"""The plots of a report as SVG text, for a page or a file of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aicompress.report import numbers
from aicompress.report.drawing import (
    INK,
    LINE,
    MUTED,
    PALE,
    PALETTE,
    WIDTH,
    Area,
    Bar,
    Dot,
    Drawing,
    Line,
    Shape,
    Text,
    legend,
    legend_height,
    text_width,
)  # fmt: skip
from aicompress.report.model import LayerRow, Report

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


_KIND_COLOURS = {
    "linear": PALETTE[0],
    "conv": PALETTE[3],
    "embedding": PALETTE[1],
    "head": PALETTE[2],
    "scale": PALETTE[6],
    "other": PALETTE[5],
    "header": MUTED,
}
_LABELLED = 60  # layers that a plot names; beyond that every k-th
_ROW = 17.0  # height of a layer's row
_TICKS = 9  # most labels of a vertical axis


def kinds(report: Report) -> str:
    """Bytes by tensor kind: a stacked bar for before and one for after."""
    sides = [("before", report.before), ("after", report.after)]
    shown = [(name, side.by_kind) for name, side in sides if side is not None]
    present = _ordered([by_kind for _, by_kind in shown])
    colours = {kind: _KIND_COLOURS.get(kind, PALETTE[at % len(PALETTE)]) for at, kind in enumerate(present)}
    widest = max(sum(by_kind.values()) for _, by_kind in shown) or 1
    axis = PlotAxis(0, 1.12 * widest, 48, WIDTH)
    shapes: list[Shape] = []
    for at, (name, by_kind) in enumerate(shown):
        top, start = 4 + 45 * at, 0
        shapes.append(Text(axis.start - 5, top + 20, name, anchor="end"))
        for kind in present:
            count = by_kind.get(kind, 0)
            left, right = axis.place(start), axis.place(start + count)
            shapes.append(Bar(left, top, right - left, 32, colours[kind]))
            if count > 0.09 * widest:
                shapes.append(Text((left + right) / 2, top + 20, numbers.size(count), "white", 12, "middle"))
            start += count
        shapes.append(Text(axis.place(start) + 7, top + 20, numbers.size(start), size=12, bold=True))
    bottom = 45 * len(shown)
    shapes += legend(list(colours.items()), bottom)
    height = bottom + legend_height(list(colours.items()))
    return Drawing("Bytes by tensor kind, before and after", height, shapes).svg()


def layers(rows: Sequence[LayerRow]) -> str:
    """One line per layer, in order: bytes before and after, and the relative error."""
    methods = list(dict.fromkeys(row.method for row in rows))
    colours = {name: PALETTE[at % len(PALETTE)] for at, name in enumerate(methods)}
    every = math.ceil(len(rows) / _LABELLED)
    names = [_elided(row.name) for row in rows[::every]]
    left = 6 + max(text_width(name, 11) for name in names)
    middle = left + 0.52 * (WIDTH - left)
    bottom = 24 + _ROW * min(len(rows), _LABELLED)
    y_axis = PlotAxis(0, len(rows), 24, bottom)
    size = PlotAxis(0, 1.02 * (max(max(row.bytes_before, row.bytes_after) for row in rows) or 1), left, middle)
    known = [(at, row) for at, row in enumerate(rows) if row.rel_error is not None and math.isfinite(row.rel_error)]
    errors = [row.rel_error or 0.0 for _, row in known]
    error = PlotAxis(0, 1.05 * max(errors, default=0) or 1, middle + 42, WIDTH - 8)
    shapes: list[Shape] = [Text(size.start, 14, "bytes before (pale) and after", size=12.5)]
    shapes.append(Text(error.start, 14, "relative error ‖W − Ŵ‖ / ‖W‖", size=12.5))
    shapes += _vertical_grid(size, (24, bottom), [(at, numbers.size(round(at))) for at, _ in size.ticks(5)])
    shapes += _vertical_grid(error, (24, bottom), error.ticks(6))
    for at, name in zip(range(0, len(rows), every), names, strict=True):
        shapes.append(Text(left - 5, y_axis.place(at + 0.5) + 4, name, anchor="end"))
    shapes += _row_bars([row.bytes_before for row in rows], (size, y_axis), 0.72, PALE)
    for method, colour in colours.items():
        lengths = [row.bytes_after if row.method == method else None for row in rows]
        shapes += _row_bars(lengths, (size, y_axis), 0.36, colour)
    for (at, row), value in zip(known, errors, strict=True):
        x, y = error.place(value), y_axis.place(at + 0.5)
        if len(rows) <= _LABELLED:
            shapes.append(Line(((error.start, y), (x, y)), LINE, 1.2))
        shapes.append(Dot(x, y, 3, colours[row.method]))
    entries = list(colours.items()) if len(colours) > 1 else []
    shapes += legend(entries, bottom + 26)
    height = bottom + 22 + legend_height(entries)
    return Drawing("Bytes and relative error of each layer", height, shapes).svg()


def training(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Training curves over steps; a value that is not finite leaves its point out."""
    finite = {name: [point for point in points if math.isfinite(point[1])] for name, points in curves.items()}
    points = [point for curve in finite.values() for point in curve] or [(0.0, 0.0)]
    top, bottom = 8.0, 222.0
    y_axis = scaled([value for _, value in points], (bottom, top), 0.05)
    left = 8 + max(text_width(label, 11) for _, label in y_axis.ticks(_TICKS))
    x_axis = fitted([step for step, _ in points], (left, WIDTH - 2), 0.05)
    shapes = [*_horizontal_grid(y_axis, (left, WIDTH - 2), INK), *_frame(left, top, bottom)]
    shapes += [Text(x_axis.place(at), bottom + 16, label, MUTED, anchor="middle") for at, label in x_axis.ticks(8)]
    shapes.append(Text((left + WIDTH) / 2, bottom + 33, "step", MUTED, 11.5, "middle"))
    legend_x = WIDTH - 50 - max((text_width(name, 11) for name in finite), default=0)
    for number, (name, curve) in enumerate(finite.items()):
        colour, y = PALETTE[number % len(PALETTE)], top + 14 + 17 * number
        places = tuple((x_axis.place(step), y_axis.place(value)) for step, value in curve)
        marks = [Dot(x, y, 2.2, colour) for x, y in places] if len(curves[name]) < 25 else []
        shapes += [Line(places, colour, 1.5), *marks, Line(((legend_x, y - 4), (legend_x + 24, y - 4)), colour, 1.5)]
        shapes.append(Text(legend_x + 32, y, name))
    return Drawing("Training curves", bottom + 40, shapes).svg()


def pareto(points: Sequence[tuple[str, float, float, bool]], x_label: str, y_label: str) -> str:
    """Size against quality: (name, size, quality, Pareto-optimal) per report; the optimal ones are joined by a line."""
    top, bottom = 8.0, 328.0
    finite = [point for point in points if math.isfinite(point[2])]
    y_axis = scaled([y for _, _, y, _ in finite] or [0.0], (bottom, top), 0.16)
    left = 26 + max(text_width(label, 11) for _, label in y_axis.ticks(_TICKS))
    x_axis = fitted([x for _, x, _, _ in finite] or [0.0], (left, WIDTH - 2), 0.14)
    shapes = [
        *_vertical_grid(x_axis, (top, bottom), x_axis.ticks(7)),
        *_horizontal_grid(y_axis, (left, WIDTH - 2), MUTED),
    ]
    shapes += _frame(left, top, bottom)
    shapes.append(Text((left + WIDTH) / 2, bottom + 34, x_label, MUTED, 11.5, "middle"))
    shapes.append(Text(12, (top + bottom) / 2, y_label, MUTED, 11.5, "middle", vertical=True))
    optimal = sorted((x_axis.place(x), y_axis.place(y)) for _, x, y, best in finite if best)
    shapes += [Line(tuple(optimal), PALETTE[0], 1.4, 0.5)] if optimal else []
    for name, value, quality, best in finite:
        x, y = x_axis.place(value), y_axis.place(quality)
        shapes.append(Dot(x, y, 4.5, PALETTE[0] if best else PALE))
        fits = x + 8 + text_width(name, 12) <= WIDTH
        height = y - 6 if best else y + 15
        shapes.append(Text(x + 8 if fits else x - 8, height, name, size=12, anchor="start" if fits else "end"))
    return Drawing(f"{y_label} against {x_label}", bottom + 42, shapes).svg()


def _row_bars(
    lengths: Sequence[int | None], axes: tuple[PlotAxis, PlotAxis], thickness: float, colour: str
) -> list[Shape]:
    """Bars to the right, one per row; where they are too many to tell apart, one outline keeps the file small.

    Args:
        lengths: of the bars; None where a row has none.
        axes: horizontal and vertical; a row takes 1 of the vertical one.
        thickness: of a bar, as a share of its row.
        colour: of all bars.
    """
    x_axis, y_axis = axes
    if len(lengths) <= _LABELLED:
        high = thickness * (y_axis.place(1) - y_axis.place(0))
        return [
            Bar(x_axis.start, y_axis.place(at + 0.5) - high / 2, x_axis.place(length) - x_axis.start, high, colour)
            for at, length in enumerate(lengths)
            if length is not None
        ]
    corners = [
        (x_axis.place(length or 0), y_axis.place(edge)) for at, length in enumerate(lengths) for edge in (at, at + 1)
    ]
    return [Area(((x_axis.start, y_axis.start), *corners, (x_axis.start, y_axis.end)), colour)]


def _vertical_grid(axis: PlotAxis, ends: tuple[float, float], ticks: Sequence[tuple[float, str]]) -> list[Shape]:
    """Grid lines of a horizontal axis from top to bottom, each with its label below."""
    shapes: list[Shape] = []
    for value, label in ticks:
        x = axis.place(value)
        shapes.append(Line(((x, ends[0]), (x, ends[1])), LINE))
        shapes.append(Text(x, ends[1] + 16, label, MUTED, anchor="middle"))
    return shapes


def _horizontal_grid(axis: PlotAxis, ends: tuple[float, float], colour: str) -> list[Shape]:
    """Grid lines of a vertical axis from left to right, each with its label before it."""
    shapes: list[Shape] = []
    for value, label in axis.ticks(_TICKS):
        y = axis.place(value)
        shapes.append(Line(((ends[0], y), (ends[1], y)), LINE))
        shapes.append(Text(ends[0] - 5, y + 4, label, colour, anchor="end"))
    return shapes


def _frame(left: float, top: float, bottom: float) -> list[Shape]:
    """The lines of both axes."""
    return [Line(((left, top), (left, bottom), (WIDTH - 2, bottom)), LINE)]


def _ordered(sides: Sequence[Mapping[str, int]]) -> list[str]:
    """Kinds that hold any bytes: the known ones first, always in the same order and colour."""
    present = {kind for by_kind in sides for kind, count in by_kind.items() if count}
    return [kind for kind in _KIND_COLOURS if kind in present] + sorted(present - set(_KIND_COLOURS))


def _elided(name: str) -> str:
    """A layer's name with its middle left out where it is long; the end tells layers apart."""
    return name if len(name) <= 44 else f"{name[:14]}…{name[-29:]}"
