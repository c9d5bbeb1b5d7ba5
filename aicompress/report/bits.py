"""The table of a search for widths: what every layer got, and why not one more or one less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aicompress.report import numbers
from aicompress.report.model import Report
from aicompress.report.numbers import DASH
from aicompress.report.table import Cell, Table, columns

KILO = 1000  # bytes that a price is for


def table(report: Report) -> Table:
    """A row per unit of layers that got one width; empty for a step that did not search."""
    headings = columns(
        "layers", "bits:", "group:", "bytes:", "loss:", "losses by bits and group?", "a width less adds, per KB:",
        "a width more saves, per KB:",
    )  # fmt: skip
    return Table("Bits", headings, tuple(_row(unit) for unit in report.bits.get("units", ())))


def legend(report: Report) -> str:
    """What was measured and aimed at, in a sentence or two."""
    search = report.bits
    if not search:
        return ""
    what = f"Loss: {search['loss']} on {search['samples']} calibration samples with only these layers changed"
    what += ", from the outputs of their blocks" if search["measured"] == "blocks" else ""
    what += "; rounding with scales of least error stands in for the method." if search["stand_in"] else "."
    return " ".join((what, *(f"{_chosen(each)}." for each in (*search.get("levels", ()), search))))


def _chosen(search: Mapping[str, Any]) -> str:
    """What was aimed at, and what the choice loses."""
    value = search["value"]
    aim = f"{value:,}" if isinstance(value, int) else f"{value:g}"
    where = f" in {search['level']}" if "level" in search else ""
    chosen = f"Chosen for {search['target']} {aim}{where}: the losses add up to {numbers.number(search['sum'])}"
    if search["evaluations"]:
        chosen += f", together they are {numbers.number(search['after'])}"
        chosen += f" ({numbers.number(search['before'])} before {search['evaluations']} trials)"
    return chosen


def _row(unit: Mapping[str, Any]) -> tuple[Cell, ...]:
    first, *others = unit["layers"]
    here = next(option for option in unit["options"] if _width(option) == _width(unit))
    options = _worth(unit["options"], here)
    at = options.index(here)
    losses = ", ".join(f"{_width(option)}: {numbers.number(option['loss'], 3)}" for option in options)
    less = _price(options[at - 1], here) if at else None
    more = _price(here, options[at + 1]) if at + 1 < len(options) else None
    return (
        Cell(first + (f" and {len(others)} that share its input" if others else ""), first, code=True),
        Cell(str(unit["bits"]), unit["bits"]),
        Cell(str(group), group) if (group := unit.get("group")) is not None else Cell(DASH),
        Cell(numbers.size(here["bytes"]), here["bytes"]),
        Cell(numbers.number(here["loss"], 3), here["loss"]),
        Cell(losses),
        *(Cell(DASH if price is None else numbers.number(price, 3), price) for price in (less, more)),
    )


def _width(option: Mapping[str, Any]) -> str:
    group = option.get("group")
    return f"{option['bits']}" if group is None else f"{option['bits']}/{group}"


def _worth(options: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Options that lose less than every cheaper one, and the chosen one, in order of their bytes."""
    kept: list[Mapping[str, Any]] = []
    least = float("inf")
    for option in sorted(options, key=lambda option: (option["bytes"], option["loss"])):
        if option["loss"] < least or option is chosen:
            kept.append(option)
        least = min(least, option["loss"])
    return kept


def _price(narrow: Mapping[str, Any], wide: Mapping[str, Any]) -> float | None:
    """Loss that a kilobyte between two widths is worth."""
    spent = wide["bytes"] - narrow["bytes"]
    return KILO * float(narrow["loss"] - wide["loss"]) / spent if spent > 0 else None
