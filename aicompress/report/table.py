"""A table of plain cells: what every rendering of a report draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from aicompress.report import numbers
from aicompress.report.numbers import DASH

Tone = Literal["", "good", "bad"]


@dataclass(frozen=True)
class Cell:
    """One entry of a table.

    Attributes:
        text: what is shown.
        sort: what a sortable table orders by; None sorts last.
        code: a name, path or pattern: set in a fixed-width face.
        tone: good or bad where the entry is a verdict.
    """

    text: str
    sort: float | str | None = None
    code: bool = False
    tone: Tone = ""


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        title: its heading.
        numeric: holds numbers: set flush right.
        optional: may be left out where the table is wider than the terminal.
    """

    title: str
    numeric: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns; `title` may be empty."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...] = field(default=())

    @classmethod
    def of(cls, title: str, headings: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
        """A table of plain values: None is an en dash, columns that hold only numbers are set flush right."""
        cells = tuple(tuple(_cell(value) for value in row) for row in rows)
        columns = []
        for at, heading in enumerate(headings):
            entries = [row[at] for row in rows if row[at] is not None]
            columns.append(Column(heading, bool(entries) and all(isinstance(e, int | float) for e in entries)))
        return cls(title, tuple(columns), cells)


def columns(*titles: str) -> tuple[Column, ...]:
    """Columns from their headings; a colon at the end marks numbers, a question mark before it an optional column."""
    return tuple(Column(title.rstrip("?:"), title.endswith(":"), "?" in title) for title in titles)


def scalar(value: Any) -> str:
    """A value of a free-form section; a digest is shortened to what tells it apart."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return numbers.number(value)
    if isinstance(value, list | tuple):
        return ", ".join(scalar(item) for item in value) or DASH
    text = str(value)
    return text[:12] if len(text) == 64 and all(c in "0123456789abcdef" for c in text) else text


def _cell(value: object) -> Cell:
    if isinstance(value, Cell):
        return value
    sort = value if isinstance(value, int | float | str) else None
    return Cell(scalar(value), sort)
