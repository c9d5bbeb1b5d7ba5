"""Markdown tables of a run: every row, ours beside its peers, where a peer is ahead, and the targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from scripts.bench.rows import Row, Target
from scripts.bench.store import Record

Rounds = Mapping[str, Mapping[int, Record]]  # row key -> round -> record


@dataclass(frozen=True)
class Column:
    """A figure as a column.

    Attributes:
        figure: its name in the store.
        title: with its unit.
        show: the number as text.
        spread: least and greatest round are shown beside the median.
        lower: less is better; None where neither is.
    """

    figure: str
    title: str
    show: Callable[[float], str]
    spread: bool = False
    lower: bool | None = True


def seconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def megabytes(value: float) -> str:
    return f"{value / 1e6:.2f}" if value < 1e8 else f"{value / 1e6:.0f}"


LANGUAGE = (
    Column("seconds", "compress s", seconds, spread=True),
    Column("wall", "process s", seconds),
    Column("peak_rss", "peak RSS MB", lambda value: f"{value / 1e6:.0f}"),
    Column("bytes", "weights MB", megabytes),
    Column("kl", "KL", lambda value: f"{value:.4f}"),
    Column("perplexity", "perplexity", lambda value: f"{value:.2f}"),
    Column("top1", "top-1 agreement", lambda value: f"{value:.4f}", lower=False),
)
WHOLE = Column("file", "file / input", lambda value: f"{value:.3f}")
LAYERS = Column("layers", "pruned layers / dense", lambda value: f"{value:.3f}")
FORWARD = Column("forward", "forward / input", lambda value: f"{value:.3f}", spread=True)


def rounds(records: Iterable[Record]) -> dict[str, dict[int, Record]]:
    """Records that have figures, by row and round."""
    found: dict[str, dict[int, Record]] = {}
    for record in records:
        if not record.failed:
            found.setdefault(record.row, {})[record.round] = record
    return found


def values(measured: Mapping[int, Record], figure: str) -> list[float]:
    """A figure of one row in every round that has it."""
    return [r.figures[figure] for r in measured.values() if r.figures.get(figure) is not None]


def ratios(ours: Mapping[int, Record], peer: Mapping[int, Record], figure: str) -> list[float]:
    """Ours / peer in every round that both have; without such a round that of the medians."""

    def pair(one: Record, other: Record) -> list[float]:
        a, b = one.figures.get(figure), other.figures.get(figure)
        return [a / b] if a is not None and b else []

    same = [ratio for number in sorted(set(ours) & set(peer)) for ratio in pair(ours[number], peer[number])]
    if same:
        return same
    a, b = values(ours, figure), values(peer, figure)
    return [median(a) / median(b)] if a and b and median(b) else []


def cell(found: Sequence[float], column: Column) -> str:
    """The median, with least and greatest where they are asked for."""
    if not found:
        return ""
    middle, low, high = (column.show(f(found)) for f in (median, min, max))
    return f"{middle} ({low} to {high})" if column.spread and low != high else middle


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Markdown: the first two columns to the left, numbers to the right."""
    rule = ["---" if at < 2 else "---:" for at in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines)) + "\n"


def measured_table(rows: Sequence[Row], found: Rounds, columns: Sequence[Column]) -> str:
    """Every row of a group that has figures."""
    shown = [c for c in columns if any(values(found.get(row.key, {}), c.figure) for row in rows)]
    lines = []
    for row in rows:
        if row.key in found:
            name = f"**{row.tool}**" if row.is_ours else row.tool
            figures = [cell(values(found[row.key], column.figure), column) for column in shown]
            lines.append([row.key, name, *figures, str(len(found[row.key])), row.note])
    return table(["row", "tool", *(column.title for column in shown), "rounds", ""], lines) if lines else ""


def compared_table(rows: Sequence[Row], found: Rounds, columns: Sequence[Column]) -> str:
    """Ours / peer by figure, of rounds of the same run; above 1 in bold where less is better."""
    pairs = [(row.key, peer) for row in rows for peer in row.against if row.key in found and peer in found]
    both = {
        (pair, column.figure): ratios(found[pair[0]], found[pair[1]], column.figure)
        for pair in pairs
        for column in columns
        if column.lower
    }
    shown = [column for column in columns if any(both.get((pair, column.figure)) for pair in pairs)]
    lines = [[*pair, *(ratio_cell(both[pair, column.figure]) for column in shown)] for pair in pairs]
    return table(["ours", "/ peer", *(column.title for column in shown)], lines) if lines else ""


def ratio_cell(found: Sequence[float]) -> str:
    """A ratio where less is better, bold where the peer is ahead."""
    if not found:
        return ""
    text = f"{median(found):.2f}"
    return f"**{text}**" if is_worse(median(found), lower=True) else text


def behind(rows: Sequence[Row], found: Rounds, columns: Sequence[Column]) -> list[str]:
    """A line for every figure in which a peer is ahead of ours."""
    lines = []
    for row in rows:
        for peer in row.against:
            worse = []
            for column in columns:
                both = ratios(found.get(row.key, {}), found.get(peer, {}), column.figure)
                if both and is_worse(median(both), column.lower):
                    worse.append(f"{column.title} {median(both):.2f} ×")
            if worse:
                lines.append(f"- {row.key} against {peer}: {', '.join(worse)}")
    return lines


def is_worse(ratio: float, lower: bool | None) -> bool:
    """Whether a ratio speaks for the peer, by more than half a percent."""
    return ratio > 1.005 if lower else lower is False and ratio < 0.995


def target_table(targets: Sequence[Target], found: Rounds) -> str:
    """Every target with its figure, met or missed; not measured where a row is missing."""
    lines = []
    for target in targets:
        mine = found.get(target.row, {})
        if target.peer:
            got = ratios(mine, found.get(target.peer, {}), target.figure)
            wanted = f"≤ {target.limit:g} × {target.peer}"
        else:
            got = values(mine, target.figure)
            wanted = f"≤ {target.limit:g}"
        value = f"{median(got):.4g}" + (" ×" if target.peer else "") if got else ""
        verdict = "not measured" if not got else "met" if median(got) <= target.limit else "**missed**"
        lines.append([target.row, target.figure, wanted, value, verdict])
    return table(["row", "figure", "target", "measured", ""], lines) if lines else ""


def failures(rows: Sequence[Row], records: Iterable[Record]) -> list[str]:
    """A line for every row that failed and has no figures."""
    known = list(records)
    done = {record.row for record in known if not record.failed}
    last = {record.row: record.failed for record in known if record.failed}
    return [f"- {row.key} ({row.tool}): {last[row.key]}" for row in rows if row.key in last and row.key not in done]


def conditions(records: Sequence[Record]) -> str:
    """Machine, threads and versions of a run; several where they changed within it."""
    kinds: list[dict[str, Any]] = []
    for record in records:
        if record.environment and record.environment not in kinds:
            kinds.append(record.environment)
    return "\n".join("Measured with " + ", ".join(f"{name} {value}" for name, value in k.items()) + "." for k in kinds)


def section(
    title: str,
    rows: Sequence[Row],
    records: Sequence[Record],
    targets: Sequence[Target] = (),
    columns: Sequence[Column] = (*LANGUAGE, FORWARD),
) -> str:
    """All tables of one part of a benchmark."""
    keys = {row.key for row in rows}
    mine = [record for record in records if record.row in keys]
    found = rounds(mine)
    groups = list(dict.fromkeys(row.group for row in rows))
    parts = [f"## {title}\n"]
    for group in groups:
        text = measured_table([row for row in rows if row.group == group], found, columns)
        parts += [f"### {group}\n", text] if text else []
    compared = compared_table(rows, found, columns)
    parts += ["### Ours / peer, in the same rounds of this run\n", compared] if compared else []
    lost = behind(rows, found, columns)
    parts += ["### Where a peer is ahead (ours / peer)\n", "\n".join(lost) + "\n"] if lost else []
    judged = target_table([target for target in targets if target.row in keys], found)
    parts += ["### Targets\n", judged] if judged else []
    failed = failures(rows, mine)
    parts += ["### Not measured\n", "\n".join(failed) + "\n"] if failed else []
    return "\n".join(parts)
