"""Several reports side by side, with those marked that no other one beats in size and quality at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath

from aicompress.report import markdown, numbers, quality
from aicompress.report.model import Report
from aicompress.report.quality import Better, Figure, figures
from aicompress.report.table import Cell, Column, Table, columns

PARETO_MARK = "●"


@dataclass(frozen=True)
class Row:
    """One report of a comparison.

    Attributes:
        name: the least of the output's path that tells it apart.
        report: of the step.
        quality: its quality figures by dotted name.
        pareto: no other row is at least as good in every objective and better in one.
    """

    name: str
    report: Report
    quality: dict[str, Figure]
    pareto: bool = False


@dataclass(frozen=True)
class Comparison:
    """Rows in the order given.

    Attributes:
        rows: one per report.
        figures: every quality figure that any report has.
        objectives: the quality figures that, with the weight bytes, decide who is Pareto-optimal: those that every
            report has and whose better direction is known and the same everywhere.
        notes: what to know before comparing.
    """

    rows: tuple[Row, ...]
    figures: tuple[str, ...]
    objectives: dict[str, Better]
    notes: tuple[str, ...]


def comparison(reports: Sequence[Report]) -> Comparison:
    """Compare reports: one row each, Pareto-optimal ones marked. Without a common quality figure none is marked."""
    names = _names([report.after.path for report in reports])
    rows = [Row(name, report, figures(report.quality)) for name, report in zip(names, reports, strict=True)]
    known = tuple(dict.fromkeys(name for row in rows for name in row.quality))
    objectives = {name: better for name in known if (better := _objective(name, rows)) is not None}
    costs = [_costs(row, objectives) for row in rows]
    marked = tuple(
        replace(row, pareto=bool(objectives) and not any(_dominates(other, own) for other in costs))
        for row, own in zip(rows, costs, strict=True)
    )
    return Comparison(marked, known, objectives, tuple(_notes(reports, known, objectives)))


def table(compared: Comparison) -> Table:
    """The comparison as a table."""
    headings = columns("name", "Pareto", "step", "weight bytes:", "size ratio:", "bits/weight:")
    headings += (*(Column(name, True) for name in compared.figures), *columns("latency ratio:", "time:"))
    return Table("Comparison", headings, tuple(_cells(row, compared.figures) for row in compared.rows))


def to_markdown(compared: Comparison) -> str:
    """The comparison as Markdown: table, legend, notes."""
    parts = [markdown.table(table(compared)), legend(compared)]
    parts += ["\n".join(f"- {markdown.text(note)}" for note in compared.notes)] if compared.notes else []
    return "\n\n".join(parts) + "\n"


def legend(compared: Comparison) -> str:
    """What the Pareto mark means here."""
    if not compared.objectives:
        return "No row is marked Pareto-optimal: the reports share no quality figure whose better direction is known."
    goals = ", ".join(f"{name} ({better} is better)" for name, better in compared.objectives.items())
    return (
        f"{PARETO_MARK} Pareto-optimal: no other row is as good in weight bytes and {goals} and better in one of them."
    )


def _objective(name: str, rows: Sequence[Row]) -> Better | None:
    """The better direction of a figure that every row has a value for, if all agree on it."""
    figures = [row.quality.get(name) for row in rows]
    directions = {figure.better if figure is not None and figure.value is not None else None for figure in figures}
    return directions.pop() if len(directions) == 1 else None


def _costs(row: Row, objectives: dict[str, Better]) -> tuple[float, ...]:
    """The objectives of a row, all of them better when lower."""
    values = []
    for name, better in objectives.items():
        value = row.quality[name].value
        assert value is not None, "an objective is measured in every row"
        values.append(value if better == "lower" else -value)
    return (row.report.after.weight_bytes, *values)


def _dominates(other: tuple[float, ...], own: tuple[float, ...]) -> bool:
    """At least as good everywhere and better somewhere."""
    return other != own and all(theirs <= mine for theirs, mine in zip(other, own, strict=True))


def _cells(row: Row, names: Sequence[str]) -> tuple[Cell, ...]:
    measured = []
    for name in names:
        figure = row.quality.get(name)
        if figure is None:
            measured.append(Cell(numbers.DASH))
            continue
        spread = quality.interval(figure)
        text = numbers.number(figure.value) + (f" ({spread})" if spread != numbers.DASH else "")
        text += f"; {quality.against_baseline(figure)}" if figure.change is not None else ""
        measured.append(Cell(text, figure.value))
    report, latency = row.report, row.report.latency.ratio if row.report.latency else None
    return (
        Cell(row.name, row.name, code=True),
        Cell(PARETO_MARK, 0, tone="good") if row.pareto else Cell("", 1),
        Cell(report.command, report.command),
        Cell(numbers.exact_size(report.after.weight_bytes), report.after.weight_bytes),
        Cell(numbers.ratio(report.size_ratio), report.size_ratio),
        Cell(numbers.number(report.bits_per_original_weight, 3), report.bits_per_original_weight),
        *measured,
        Cell(numbers.ratio(latency), latency),
        Cell(numbers.duration(report.seconds), report.seconds),
    )


def _notes(reports: Sequence[Report], known: Sequence[str], objectives: dict[str, Better]) -> list[str]:
    notes = []
    inputs = {tuple(r.before.sha256.items()) or r.before.path for r in reports if r.before is not None}
    if len(inputs) > 1:
        notes.append("The reports start from different inputs: their size and latency ratios have different bases.")
    if any(figure.change is not None for report in reports for figure in figures(report.quality).values()):
        notes.append("Behind a semicolon: the ratio to the baseline's figure, or the difference, on the same samples.")
    measures = [r.recipe["quality"] for r in reports if "quality" in r.recipe]
    if any(measure != measures[0] for measure in measures):
        notes.append("The reports measured quality with different recipes: their figures may not be comparable.")
    ran_on = {figure.kernels for report in reports for figure in figures(report.quality).values()} - {""}
    if len(ran_on) > 1:
        notes.append(
            f"The models ran on different kernels ({', '.join(sorted(ran_on))}), which round in their own ways: "
            "`kernels: reference` measures the stored numbers."
        )
    machines = {str(r.environment.get("cpu")) + str(r.environment.get("threads")) for r in reports if r.latency}
    if len(machines) > 1:
        notes.append("Latencies were measured on different machines or thread counts.")
    left_out = [name for name in known if name not in objectives]
    if left_out and len(reports) > 1:
        notes.append(
            f"Not an objective, as not every report has it or its better direction is unknown: {', '.join(left_out)}."
        )
    return notes


def _names(paths: Sequence[str]) -> list[str]:
    """The shortest tail of each path that no other path shares; the same path twice gets a number."""
    parts = [PurePath(path).parts or (path,) for path in paths]
    names = []
    for own in parts:
        others = [other for other in parts if other != own]
        keep = next((n for n in range(1, len(own)) if all(own[-n:] != other[-n:] for other in others)), len(own))
        names.append("/".join(own[-keep:]))
    return [
        f"{name} #{names[: at + 1].count(name)}" if names.count(name) > 1 else name for at, name in enumerate(names)
    ]
