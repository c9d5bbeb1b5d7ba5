"""Tables and reports on standard output: as wide as the terminal, plain and never wrapped in a pipe or a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, TextIO

from aicompress.report import plan as plans
from aicompress.report import quality, tables
from aicompress.report.model import Report
from aicompress.report.plan import PlanSummary
from aicompress.report.table import Table, Tone

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_STYLES: dict[Tone, str] = {"": "", "good": "green", "bad": "bold red"}
_PIPE_WIDTH = 10_000  # columns: a line of a pipe or file is as long as it needs to be
_GAP = 3  # characters between columns
_READABLE = 100  # columns of running text
_NAMES = 20  # columns that names are given beside their paragraphs; longer ones stand above
Entry = tuple[str, Sequence[str]]  # a name, and paragraphs
_ASCII = str.maketrans({"–": "-", "→": ">", "×": "x", "●": "*", "−": "-", "‖": "|", "…": "~"})


def report(content: Report, file: TextIO | None = None) -> None:
    """Print a report without its layers: warnings and gates first, then size, quality and training."""
    console = _console(file)
    console.print(_text(console, f"{content.command}: {tables.route(content)}", "bold"))
    console.print(_text(console, tables.headline(content)))
    for warning in content.warnings:
        console.print(_text(console, f"warning: {warning}", "yellow"))
    for note in content.notes:
        console.print(_text(console, f"note: {note}"))
    sections = (tables.gates, tables.summary, quality.table, tables.baselines, tables.kinds, tables.training)
    for section in (build(content) for build in sections):
        if section.rows:
            _print(console, section)


def table(content: Table, file: TextIO | None = None) -> None:
    """Print a table. `Table.of(title, headings, rows)` makes one of plain values."""
    _print(_console(file), content)


def definitions(title: str, entries: Sequence[Entry]) -> None:
    """Print names with paragraphs beside them, folded to a width that can be read, also in a pipe or a file."""
    console = _console(None)
    width = min(console.width, _READABLE)
    if title:
        console.print(_text(console, title, "bold"))
    indent = min(max((len(name) for name, _ in entries), default=0), _NAMES) + 2 * _GAP
    for name, paragraphs in entries:
        lines = [
            line
            for paragraph in paragraphs
            for line in wrap(paragraph, max(20, width - indent), break_on_hyphens=False)
        ]
        head = f"{'':{_GAP}}{name}"
        first = [] if len(head) + _GAP > indent + _GAP else lines[:1]
        console.print(_text(console, f"{head:<{indent}}{first[0] if first else ''}".rstrip()), soft_wrap=True)
        for line in lines[len(first) :]:
            console.print(_text(console, f"{'':{indent}}{line}"), soft_wrap=True)


def _print(console: Console, content: Table) -> None:
    from rich import box
    from rich.table import Table as Grid

    if content.title:
        console.print()
        console.print(_text(console, content.title, "bold"))
    shown = _fitting(content, console.width)
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    for at in shown:
        # Numbers keep their line; text gives way and folds, so that nothing is cut off.
        heading = _text(console, content.columns[at].title)
        if content.columns[at].numeric:
            grid.add_column(heading, justify="right", no_wrap=True)
        else:
            grid.add_column(heading, overflow="fold")
    for row in content.rows:
        grid.add_row(*(_text(console, row[at].text, _STYLES[row[at].tone]) for at in shown))
    console.print(grid)
    hidden = [column.title for at, column in enumerate(content.columns) if at not in shown]
    if hidden:
        console.print(_text(console, f"not shown at this width: {', '.join(hidden)}", "dim"))


def _fitting(content: Table, width: int) -> list[int]:
    """The columns to show: optional ones go, last first, until the rest fits."""
    widths = [
        max([len(column.title), *(len(row[at].text) for row in content.rows)])
        for at, column in enumerate(content.columns)
    ]
    shown = list(range(len(widths)))
    for at in reversed(range(len(widths))):
        if sum(widths[kept] + _GAP for kept in shown) - _GAP <= width:
            break
        if content.columns[at].optional:
            shown.remove(at)
    return shown


def _console(file: TextIO | None) -> Console:
    """A console that reads nothing as markup; colours only on a terminal, and not where NO_COLOR is set."""
    from rich.console import Console

    console = Console(file=file or sys.stdout, markup=False, emoji=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPE_WIDTH
    return console


def _text(console: Console, content: str, style: str = "") -> Text:
    """Text that the terminal can show: no control characters of a checkpoint's names reach it."""
    from rich.text import Text

    shown = "".join(character if character.isprintable() else "?" for character in content)
    if console.options.ascii_only:
        shown = shown.translate(_ASCII).encode("ascii", "replace").decode("ascii")
    return Text(shown, style)


def plan(content: PlanSummary, file: TextIO | None = None) -> None:
    """Print what a dry run found: the method, every layer that changes, every file."""
    console = _console(file)
    console.print(_text(console, f"{content.command} (dry run): {content.source} → {content.out}", "bold"))
    console.print(_text(console, plans.method(content)))
    console.print(_text(console, plans.layout(content)))
    for measurement in content.survey:
        console.print(_text(console, f"survey: {measurement}"))
    for warning in content.warnings:
        console.print(_text(console, f"warning: {warning}", "yellow"))
    for note in content.notes:
        console.print(_text(console, f"note: {note}"))
    _print(console, plans.layers(content))
    _print(console, plans.files(content))
    if left := plans.untouched(content):
        console.print(_text(console, left))
    console.print(_text(console, plans.headline(content), "bold"))
