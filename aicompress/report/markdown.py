"""A report as Markdown that can be pasted into a pull request."""

from __future__ import annotations

import re
from typing import Any

import yaml

from aicompress.report import bits, quality, tables
from aicompress.report.model import Report
from aicompress.report.table import Cell, Table

# What GitHub reads as markup inside a line: emphasis, code, links, strike-through, cell borders, tags and entities.
_SPECIAL = re.compile(r"([\\*`\[|~]|<(?=[a-zA-Z/!?])|&(?=#?\w+;)|^[>#+-]|(?<![^\W_])_|_(?![^\W_]))")


def to_markdown(report: Report) -> str:
    """Warnings and failed gates first, then the figures; the long parts are folded away."""
    parts = [
        f"# {report.command}: {code(report.after.path)}"
        if report.before is None
        else f"# {report.command}: {code(report.before.path)} → {code(report.after.path)}",
        f"**{tables.headline(report)}.**",
        _alert("WARNING", report.warnings),
        _alert("NOTE", report.notes),
        _alert("CAUTION", tuple(f"Gate failed: {g.expression}" for g in report.gates if not g.passed)),
        table(tables.summary(report)),
    ]
    for section in (
        tables.gates(report),
        quality.table(report),
        tables.baselines(report),
        tables.kinds(report),
        tables.training(report),
    ):
        if section.rows:
            parts.append(f"## {section.title}\n\n{table(section)}")
    chosen = bits.table(report)
    if chosen.rows:
        parts.append(_folded(f"{chosen.title} ({len(chosen.rows)})", f"{text(bits.legend(report))}\n\n{table(chosen)}"))
    for section in (tables.layers(report), tables.lineage(report), tables.environment(report)):
        if section.rows:
            parts.append(_folded(f"{section.title} ({len(section.rows)})", table(section)))
    parts.append(_folded("Recipe", fenced(recipe_yaml(report.recipe), "yaml")) if report.recipe else "")
    return "\n\n".join(part for part in parts if part) + "\n"


def table(content: Table) -> str:
    """A table in GitHub's Markdown; numbers flush right."""
    lines = [
        _line([text(column.title) for column in content.columns]),
        _line(["---:" if column.numeric else "---" for column in content.columns]),
        *(_line([_cell(cell) for cell in row]) for row in content.rows),
    ]
    return "\n".join(lines)


def code(content: str) -> str:
    """A code span that holds any text on one line; pipes are escaped, as cells of a table need."""
    line = " ".join(content.split()).replace("|", "\\|")
    fence = _fence(line, 1)
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def text(content: str) -> str:
    """Plain text on one line, with everything that Markdown would read as markup escaped."""
    return _SPECIAL.sub(r"\\\1", " ".join(content.split()))


def fenced(content: str, language: str = "") -> str:
    """A code block whose fence is longer than any within."""
    fence = _fence(content, 3)
    return f"{fence}{language}\n{content.rstrip()}\n{fence}"


def recipe_yaml(recipe: dict[str, Any]) -> str:
    """A resolved recipe as YAML, without what was left open: nulls and empty lists say nothing to its reader."""
    return yaml.safe_dump(_given(recipe), sort_keys=False, allow_unicode=True, width=100)


def _given(section: dict[str, Any]) -> dict[str, Any]:
    """A section without nulls and empty parts; rules in lists hold what their author wrote, and keep it."""
    inner = {key: _given(value) if isinstance(value, dict) else value for key, value in section.items()}
    return {key: value for key, value in inner.items() if value is not None and value not in ([], (), {})}


def _alert(kind: str, lines: tuple[str, ...]) -> str:
    """A GitHub alert with one bullet per line."""
    return "\n".join([f"> [!{kind}]", *(f"> - {text(line)}" for line in lines)]) if lines else ""


def _folded(title: str, body: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{body}\n\n</details>"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    if cell.tone == "bad":
        return f"**{text(cell.text)}**"
    return code(cell.text) if cell.code and cell.text else text(cell.text)


def _fence(content: str, least: int) -> str:
    longest = max((len(run) for run in re.findall("`+", content)), default=0)
    return "`" * max(least, longest + 1 if longest else least)
