"""A plan as `--dry-run` shows it: what every layer becomes, and the exact bytes of every file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from aicompress.report import numbers
from aicompress.report.model import Untouched
from aicompress.report.table import Table


@dataclass(frozen=True)
class PlanRow:
    """One layer that changes; its bytes are None where they depend on a choice that the run makes."""

    name: str
    kind: str
    rule: str
    before: str
    after: str
    detail: dict[str, Any]
    bytes_before: int
    bytes_after: int | None


@dataclass(frozen=True)
class Undecided:
    """What a run will choose before it writes.

    Attributes:
        target, value: what the choice aims at, e.g. target_bytes and 20000000.
        layers: how many layers are chosen for.
        least, most: weight bytes of the output between which the choice lies.
        levels: budgets of levels, in words.
    """

    target: str
    value: float
    layers: int
    least: int
    most: int
    levels: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlanSummary:
    """A step that has not run.

    Attributes:
        command: factorize, quantize, prune or distill.
        source, out: as given.
        method: the method and its resolved parameters.
        rows: layers that change; `unchanged` counts the rest.
        weight_files: exact bytes of each weight file; of the least choice where something is undecided.
        other_bytes: exact bytes of configuration and side files; the report comes on top.
        bytes_before: of the input's weight files.
        warnings: what the user should know.
        undecided: what the run chooses, or None.
        survey: what was measured on the running model while the step was planned.
        layout: how the output names its tensors.
        readers: classes of transformers that load it, as far as they were tried.
        untouched: what a layer-wise step leaves as it is; None for others.
        notes: what the user asked for, and the plan has settled.
        at_most: the output takes fewer bytes than are planned, as codes are entropy-coded, or a search lets less stay.
        is_average: the data decides what stays of each layer: the bytes are those of equal shares.
    """

    command: str
    source: str
    out: str
    method: dict[str, Any]
    rows: tuple[PlanRow, ...]
    unchanged: int
    weight_files: dict[str, int]
    other_bytes: int
    bytes_before: int
    warnings: tuple[str, ...] = ()
    undecided: Undecided | None = None
    survey: tuple[str, ...] = ()
    layout: str = ""
    readers: tuple[str, ...] = ()
    untouched: Untouched | None = None
    notes: tuple[str, ...] = ()
    at_most: bool = False
    is_average: bool = False

    @property
    def weight_bytes(self) -> int:
        return sum(self.weight_files.values())

    def to_json(self) -> str:
        plain = dataclasses.asdict(self)
        known = self.undecided is None
        plain["weight_bytes"] = self.weight_bytes if known else None
        plain["size"] = {"ratio": self.weight_bytes / self.bytes_before if known and self.bytes_before else None}
        return json.dumps(plain, indent=2, ensure_ascii=False)


def layers(plan: PlanSummary) -> Table:
    """The layers that change."""
    headings = ("layer", "kind", "rule", "now", "becomes", "how", "bytes", "bytes then")
    rows = []
    for r in plan.rows:
        how = ", ".join(f"{key} {value}" for key, value in r.detail.items())
        rows.append((r.name, r.kind, r.rule, r.before, r.after, how, r.bytes_before, r.bytes_after))
    return Table.of(f"{len(rows)} layers change, {plan.unchanged} stay as they are", headings, rows)


def files(plan: PlanSummary) -> Table:
    """The files that would be written."""
    rows: list[tuple[str, int]] = list(plan.weight_files.items())
    rows.append(("configuration and side files", plan.other_bytes))
    what = "the report comes on top" if plan.undecided is None else "with the least of all choices, and no report"
    what += "; at most" if plan.at_most else ""
    what += "; about, by equal shares of all layers" if plan.is_average else ""
    return Table.of(f"Files ({what})", ("file", "bytes"), rows)


def untouched(plan: PlanSummary) -> str:
    """What stays as it is in one line; nothing of a step that is not layer-wise, or that leaves nothing."""
    left = plan.untouched
    if left is None or not left.parameters:
        return ""
    shown = ", ".join(left.largest) + (", ..." if left.parameters > len(left.largest) else "")
    return f"{left.summary}, {numbers.exact_size(left.bytes)}: {shown}"


def headline(plan: PlanSummary) -> str:
    """The plan in one line."""
    if plan.undecided is not None:
        search, before = plan.undecided, numbers.exact_size(plan.bytes_before)
        span = f"{numbers.exact_size(search.least)} to {numbers.exact_size(search.most)}"
        value = f"{search.value:,}" if isinstance(search.value, int) else f"{search.value:g}"
        aims = ", ".join((f"{search.target} {value}", *search.levels))
        return f"weights {before} → {span}: the bits of {search.layers} layers are measured and chosen for {aims}"
    ratio = numbers.ratio(plan.weight_bytes / plan.bytes_before if plan.bytes_before else None)
    known = "at most " if plan.at_most else "about " if plan.is_average else ""
    return f"weights {numbers.exact_size(plan.bytes_before)} → {known}{numbers.exact_size(plan.weight_bytes)}, {ratio}"


def layout(plan: PlanSummary) -> str:
    """How the output is stored, and which classes of transformers load it so."""
    readers = f"; loads in {' and '.join(plan.readers)} of transformers" if plan.readers else ""
    return f"layout: {plan.layout}{readers}"


def method(plan: PlanSummary) -> str:
    """The method with every parameter, presets expanded."""
    return ", ".join(f"{key}: {value}" for key, value in plan.method.items() if value is not None)
