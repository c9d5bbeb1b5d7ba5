"""The plots of a report as SVG text, for a page or a file of their own.

Colours of text and lines are CSS variables with a fallback, so that a page can be light or dark. The same input gives
the same bytes.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aicompress.report import numbers
from aicompress.report.model import LayerRow, Report

WIDTH = 960 / 72  # inches: 960 units of the SVG, one to a CSS pixel of the page
_INK, _MUTED, _LINE, _PALE = "#1f2429", "#68727d", "#d8dde3", "#c5ced8"
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _LINE: "--line", _PALE: "--pale"}
PALETTE = ("#3d7edb", "#2a9d8f", "#e0922f", "#9069cf", "#d65a6f", "#7c8896", "#5aa9c9", "#a3a642")
_KIND_COLOURS = {
    "linear": PALETTE[0],
    "conv": PALETTE[3],
    "embedding": PALETTE[1],
    "head": PALETTE[2],
    "scale": PALETTE[6],
    "other": PALETTE[5],
    "header": _MUTED,
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "aicompress",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 12,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _LINE,
    "axes.titlecolor": _INK,
    "axes.titlesize": 12.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 11.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.8,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _INK,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.frameon": False,
    "legend.fontsize": 11,
}
_LABELLED = 60  # layers that a plot names; beyond that every k-th


def kinds(report: Report) -> str:
    """Bytes by tensor kind: a stacked bar for before and one for after."""
    sides = [("before", report.before), ("after", report.after)]
    shown = [(name, side.by_kind) for name, side in sides if side is not None]
    present = _ordered([by_kind for _, by_kind in shown])

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        widest = max(sum(by_kind.values()) for _, by_kind in shown) or 1
        for at, (_, by_kind) in enumerate(shown):
            start = 0
            for position, kind in enumerate(present):
                count = by_kind.get(kind, 0)
                colour = _KIND_COLOURS.get(kind, PALETTE[position % len(PALETTE)])
                axes.barh(at, count, left=start, height=0.56, color=colour, label=kind if at == 0 else None)
                if count > 0.09 * widest:
                    axes.text(start + count / 2, at, numbers.size(count), color="white", ha="center", va="center")
                start += count
            axes.text(start + 0.008 * widest, at, numbers.size(start), va="center", fontweight="bold")
        axes.set_yticks(range(len(shown)), [name for name, _ in shown])
        axes.set_xlim(0, 1.11 * widest)
        axes.invert_yaxis()
        axes.set_xticks([])
        axes.spines[["bottom", "left"]].set_visible(False)
        axes.tick_params(length=0)
        if present:
            figure.legend(loc="outside lower left", ncols=len(present), handlelength=0.9, handleheight=0.9)

    return _svg("kinds", "Bytes by tensor kind, before and after", (WIDTH, 0.62 * len(shown) + 0.62), draw)


def layers(rows: Sequence[LayerRow]) -> str:
    """One line per layer, in order: bytes before and after, and the relative error."""
    step = math.ceil(len(rows) / _LABELLED)
    height = 1.0 + min(0.235 * len(rows), 0.235 * _LABELLED)
    methods = list(dict.fromkeys(row.method for row in rows))
    colours = {name: PALETTE[at % len(PALETTE)] for at, name in enumerate(methods)}

    def draw(figure: Any) -> None:
        from matplotlib.patches import Patch

        size, error = figure.subplots(1, 2, sharey=True, width_ratios=(1.25, 1))
        places = range(len(rows))
        _bars(size, [row.bytes_before for row in rows], 0.72, _PALE)
        for name, colour in colours.items():
            _bars(size, [row.bytes_after if row.method == name else None for row in rows], 0.36, colour)
        size.xaxis.set_major_formatter(lambda value, _: numbers.size(round(value)))
        size.xaxis.set_major_locator(_locator(5))
        size.set_title("bytes before (pale) and after")
        size.set_yticks(places[::step], [_elided(row.name) for row in rows[::step]])
        size.set_ylim(len(rows) - 0.4, -0.6)
        known = [(at, row.rel_error, colours[row.method]) for at, row in enumerate(rows) if row.rel_error is not None]
        if known:
            at, values, dots = zip(*known, strict=True)
            error.scatter(values, at, s=30, c=dots, clip_on=False, zorder=2)
            if len(rows) <= _LABELLED:
                error.hlines(at, 0, values, colors=_LINE, linewidth=1.2, zorder=1)
        error.set_xlim(0, 1.05 * max([value for _, value, _ in known], default=0) or 1)
        error.set_title("relative error ‖W − Ŵ‖ / ‖W‖")
        for axes in (size, error):
            axes.grid(axis="x")
            axes.spines["bottom"].set_visible(False)
            axes.tick_params(length=0)
        if len(methods) > 1:
            marks = [Patch(color=colours[name], label=name) for name in methods]
            figure.legend(handles=marks, loc="outside lower left", ncols=min(len(methods), 6), handlelength=0.9)

    return _svg("layers", "Bytes and relative error of each layer", (WIDTH, height), draw)


def training(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Training curves over steps."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for at, (name, points) in enumerate(curves.items()):
            marker = "o" if len(points) < 25 else ""
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color=PALETTE[at % len(PALETTE)], label=name, marker=marker, markersize=4)
        _scale(axes, [value for points in curves.values() for _, value in points])
        axes.set_xlabel("step")
        axes.grid(axis="y")
        axes.tick_params(length=0)
        axes.legend(loc="upper right")

    return _svg("training", "Training curves", (WIDTH, 3.6), draw)


def pareto(points: Sequence[tuple[str, float, float, bool]], x_label: str, y_label: str) -> str:
    """Size against quality: (name, size, quality, Pareto-optimal) per report; the optimal ones are joined by a line."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        front = sorted((x, y) for _, x, y, best in points if best)
        if front:
            axes.plot(*zip(*front, strict=True), color=PALETTE[0], linewidth=1.4, alpha=0.5, zorder=1)
        for name, x, y, best in points:
            axes.plot([x], [y], marker="o", markersize=8, color=PALETTE[0] if best else _PALE, linestyle="", zorder=2)
            axes.annotate(name, (x, y), xytext=(8, 5 if best else -14), textcoords="offset points")
        _scale(axes, [y for _, _, y, _ in points])
        axes.margins(x=0.14, y=0.16)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid()
        axes.tick_params(length=0)
        axes.tick_params(axis="y", labelcolor=_MUTED)

    return _svg(f"pareto-{y_label}", f"{y_label} against {x_label}", (WIDTH, 5.2), draw)


def _bars(axes: Any, lengths: Sequence[int | None], height: float, colour: str) -> None:
    """Horizontal bars, one per layer; where they are too many to tell apart, one outline keeps the file small."""
    if len(lengths) <= _LABELLED:
        shown = [(at, length) for at, length in enumerate(lengths) if length is not None]
        axes.barh([at for at, _ in shown], [length for _, length in shown], height=height, color=colour)
    else:
        edges = [at - 0.5 for at in range(len(lengths) + 1)]
        axes.stairs([n or 0 for n in lengths], edges, orientation="horizontal", fill=True, color=colour, linewidth=0)


def _svg(name: str, label: str, inches: tuple[float, float], draw: Callable[[Any], None]) -> str:
    """Draw a figure and give it as an <svg> element that scales with its container."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=inches, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), re.sub(r"\W+", "-", name), label)


def _inline(svg: str, name: str, label: str) -> str:
    """The <svg> element alone: no prolog, no fixed size, ids made unique by `name`, colours as CSS variables."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\1{name}-", svg)
    svg = re.sub(r"'DejaVu Sans'", "var(--sans, 'DejaVu Sans', sans-serif)", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable}, {colour})")
    return svg


def _scale(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic y axis, ticks at 1, 2, 5, for positive values that span more than a factor of 20."""
    if min(values) > 0 and max(values) > 20 * min(values):
        from matplotlib.ticker import LogLocator, NullLocator

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _ordered(sides: Sequence[Mapping[str, int]]) -> list[str]:
    """Kinds that hold any bytes: the known ones first, always in the same order and colour."""
    present = {kind for by_kind in sides for kind, count in by_kind.items() if count}
    return [kind for kind in _KIND_COLOURS if kind in present] + sorted(present - set(_KIND_COLOURS))


def _locator(ticks: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10])


def _elided(name: str, longest: int = 44) -> str:
    """A layer's name with its middle left out where it is long; the end tells layers apart."""
    return name if len(name) <= longest else f"{name[: longest // 3]}…{name[-(longest - longest // 3 - 1) :]}"
