"""A report as one self-contained HTML page: no network, style and plots inline, readable without scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from aicompress.report import bits, compare, markdown, numbers, plots, quality, tables
from aicompress.report.compare import Comparison
from aicompress.report.model import Report
from aicompress.report.quality import figures
from aicompress.report.table import Table, Tone


@dataclass(frozen=True)
class Card:
    """One large figure at the top of the page."""

    label: str
    value: str
    note: str = ""
    tone: Tone = ""


@dataclass(frozen=True)
class Alert:
    """A box that nobody should miss; its tone is warn, bad or none."""

    title: str
    lines: tuple[str, ...]
    tone: str


@dataclass(frozen=True)
class PagePanel:
    """A panel: plots (SVG, trusted), then a table or a block of code."""

    title: str
    table: Table | None = None
    plots: tuple[str, ...] = ()
    code: str = ""
    legend: str = ""
    sortable: bool = False
    folded: bool = False


@dataclass(frozen=True)
class Page:
    """What the template shows."""

    title: str
    eyebrow: str
    route: tuple[str, ...]
    lead: str
    cards: tuple[Card, ...]
    alerts: tuple[Alert, ...]
    sections: tuple[PagePanel, ...]
    footer: str


def to_html(report: Report) -> str:
    """The page of one report: warnings and failed gates first, then figures, plots, layers and the recipe."""
    sides = (report.before, report.after)
    page = Page(
        title=f"{report.command}: {tables.route(report)}",
        eyebrow=report.command,
        route=tuple(side.path for side in sides if side is not None),
        lead=tables.headline(report),
        cards=tuple(_cards(report)),
        alerts=tuple(_alerts(report)),
        sections=tuple(
            each for each in _sections(report) if each.plots or each.code or (each.table and each.table.rows)
        ),
        footer=f"aicompress {report.tool_version}, report schema {report.schema_version}",
    )
    return _render(page)


def comparison_to_html(compared: Comparison) -> str:
    """The page of a comparison: a size-quality plot per objective, the table, the notes."""
    by_ratio = all(row.report.size_ratio is not None for row in compared.rows)
    shown = []
    for name in compared.objectives:
        points = [
            (
                row.name,
                (row.report.size_ratio if by_ratio else row.report.after.weight_bytes / 1e6) or 0.0,
                value,
                row.pareto,
            )
            for row in compared.rows
            if (value := row.quality[name].value) is not None
        ]
        shown.append(plots.pareto(points, "size ratio" if by_ratio else "weight bytes, MB", name))
    table = PagePanel("Reports", compare.table(compared), legend=compare.legend(compared), sortable=True)
    page = Page(
        title=f"Comparison of {len(compared.rows)} reports",
        eyebrow="compare",
        route=(f"{len(compared.rows)} reports",),
        lead="Size on disk against measured quality",
        cards=(),
        alerts=(Alert("Before comparing", compared.notes, "warn"),) if compared.notes else (),
        sections=(
            table,
            *(
                PagePanel(f"{name} against size", plots=(plot,))
                for name, plot in zip(compared.objectives, shown, strict=True)
            ),
        ),
        footer="aicompress",
    )
    return _render(page)


def _cards(report: Report) -> list[Card]:
    before, after, latency = report.before, report.after, report.latency
    cards = [
        Card(
            "weights on disk",
            numbers.size(after.weight_bytes),
            f"from {numbers.size(before.weight_bytes)}" if before else "",
        )
    ]
    if report.size_ratio is not None:
        tone: Tone = "good" if report.size_ratio < 1 else "bad" if report.size_ratio > 1 else ""
        cards.append(Card("size ratio", numbers.ratio(report.size_ratio), "after / before", tone))
    bits, unit = report.bits_per_original_weight, "original weight"
    if bits is None:  # a report of an earlier version
        bits, unit = after.bits_per_parameter, "parameter"
    cards.append(Card(f"bits per {unit}", numbers.number(bits, 3), "of the output, header and scales included"))
    if latency is not None:
        value = numbers.milliseconds(latency.after_ms) if latency.ratio is None else tables.latency_ratio(latency)
        cards.append(Card("latency" if latency.ratio is None else "latency ratio", value, latency.what))
    for name, figure in list(figures(report.quality).items())[:3]:
        spread = quality.interval(figure)
        against = f"baseline {numbers.number(figure.baseline)}" if figure.baseline is not None else ""
        against += f": {quality.against_baseline(figure)}" if figure.change is not None else ""
        cards.append(Card(name, numbers.number(figure.value), against or (spread if spread != numbers.DASH else "")))
    if report.gates:
        held = sum(gate.passed for gate in report.gates)
        tone = "good" if held == len(report.gates) else "bad"
        cards.append(Card("gates passed", f"{held} of {len(report.gates)}", "", tone))
    return cards


def _alerts(report: Report) -> list[Alert]:
    alerts = []
    failed = tuple(
        f"{gate.expression}: {'not measured' if gate.value is None else 'found ' + numbers.exact(gate.value)}"
        for gate in report.gates
        if not gate.passed
    )
    if failed:
        alerts.append(Alert("Failed gates", failed, "bad"))
    if report.warnings:
        alerts.append(Alert("Warnings", report.warnings, "warn"))
    if report.notes:
        alerts.append(Alert("Notes", report.notes, ""))
    return alerts


def _sections(report: Report) -> Sequence[PagePanel]:
    compressed = [row for row in report.layers if row.method not in ("-", "")]
    curves = tables.curves(report.training)
    by_kind = tables.kinds(report)
    return (
        PagePanel("Summary", tables.summary(report)),
        PagePanel("Gates", tables.gates(report)),
        PagePanel("Quality", quality.table(report)),
        PagePanel("Further baselines", tables.baselines(report)),
        PagePanel("Bytes by tensor kind", by_kind, (plots.kinds(report),) if by_kind.rows else ()),
        PagePanel("Training", tables.training(report), (plots.training(curves),) if curves else ()),
        PagePanel("Compressed layers: size and error", plots=(plots.layers(compressed),) if compressed else ()),
        PagePanel("Bits", bits.table(report), legend=bits.legend(report), sortable=True),
        PagePanel("Layers", tables.layers(report), sortable=True),
        PagePanel("Recipe", code=markdown.recipe_yaml(report.recipe) if report.recipe else ""),
        PagePanel("Lineage", tables.lineage(report)),
        PagePanel("Environment", tables.environment(report), folded=True),
    )


def _render(page: Page) -> str:
    from markupsafe import Markup

    trusted = {section.title: tuple(Markup(plot) for plot in section.plots) for section in page.sections}
    return str(_template().render(page=page, plots=trusted))


@cache
def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("aicompress.report", "."), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("template.html")
