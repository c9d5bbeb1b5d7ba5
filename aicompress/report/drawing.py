"""Drawings of a few shapes, written as an SVG element by a template.

Lengths are in units of the SVG; the page shows 960 of them as wide as its column. Colours are CSS values: those that
are variables let a page be light or dark, and have a fallback for a file of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

WIDTH = 960.0
INK, MUTED, LINE, PALE = (
    "var(--ink, #1f2429)", "var(--muted, #68727d)", "var(--line, #d8dde3)", "var(--pale, #c5ced8)",
)  # fmt: skip
PALETTE = ("#3d7edb", "#2a9d8f", "#e0922f", "#9069cf", "#d65a6f", "#7c8896", "#5aa9c9", "#a3a642")
_LEGEND_ROW = 20.0  # height of a row of a legend
_NARROW, _WIDE = set("fijlrtI.,:;|'!()[]/ "), set("mwMW@%…—")


@dataclass(frozen=True)
class Bar:
    """A filled rectangle."""

    x: float
    y: float
    width: float
    height: float
    colour: str


@dataclass(frozen=True)
class Area:
    """A filled outline through corners (x, y)."""

    corners: tuple[tuple[float, float], ...]
    colour: str


@dataclass(frozen=True)
class Line:
    """A line through points (x, y)."""

    points: tuple[tuple[float, float], ...]
    colour: str
    width: float = 0.8
    opacity: float = 1.0


@dataclass(frozen=True)
class Dot:
    """A filled circle."""

    x: float
    y: float
    radius: float
    colour: str


@dataclass(frozen=True)
class Text:
    """A line of text on the baseline y, that starts, has its middle or ends at x."""

    x: float
    y: float
    content: str
    colour: str = INK
    size: float = 11.0
    anchor: Literal["start", "middle", "end"] = "start"
    bold: bool = False
    vertical: bool = False  # turned by a quarter, read from below


Shape = Bar | Area | Line | Dot | Text


@dataclass(frozen=True)
class Drawing:
    """Shapes, drawn one over the other in their order.

    Attributes:
        label: what the drawing shows, for readers that do not see it.
        height: of the drawing, WIDTH wide.
        shapes: what is drawn.
    """

    label: str
    height: float
    shapes: Sequence[Shape]

    def svg(self) -> str:
        """The drawing as an <svg> element that scales with its container; the same shapes give the same bytes."""
        kinds = [(type(shape).__name__, shape) for shape in self.shapes]
        return str(_template().render(drawing=self, width=WIDTH, shapes=kinds))


def text_width(content: str, size: float) -> float:
    """About how wide a text is in a sans-serif font, rather more than less: the reader's font is not known."""
    return size * sum(0.38 if c in _NARROW else 0.95 if c in _WIDE else 0.7 if c.isupper() else 0.62 for c in content)


def legend(entries: Sequence[tuple[str, str]], y: float) -> list[Shape]:
    """Named colours in rows of as many as fit, the first one at the height y; `legend_height` is what they take."""
    shapes: list[Shape] = []
    for x, row, (name, colour) in _legend_places(entries):
        shapes.append(Bar(x, y + _LEGEND_ROW * row, 10, 10, colour))
        shapes.append(Text(x + 18, y + _LEGEND_ROW * row + 9, name))
    return shapes


def legend_height(entries: Sequence[tuple[str, str]]) -> float:
    """The height of a legend."""
    return _LEGEND_ROW * (1 + max((row for _, row, _ in _legend_places(entries)), default=-1))


def _legend_places(entries: Sequence[tuple[str, str]]) -> list[tuple[float, int, tuple[str, str]]]:
    """Where each entry of a legend starts, and in which row."""
    places, x, row = [], 10.0, 0
    for entry in entries:
        width = 18 + text_width(entry[0], 11)
        if x > 10 and x + width > WIDTH:
            x, row = 10.0, row + 1
        places.append((x, row, entry))
        x += width + 22
    return places


@cache
def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("aicompress.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["points"] = lambda points: " ".join(f"{_short(x)},{_short(y)}" for x, y in points)
    environment.filters["short"] = _short
    return environment.get_template("drawing.svg")


def _short(length: float) -> str:
    """A length to a hundredth, without the zeros behind it."""
    return f"{length:.2f}".rstrip("0").rstrip(".")
