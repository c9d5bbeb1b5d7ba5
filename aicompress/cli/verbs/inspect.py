"""`aicompress inspect`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aicompress.cli import options as o
from aicompress.report.table import Table

if TYPE_CHECKING:
    from aicompress.pipeline.inspect import Inspection

EXAMPLES = """Examples:

aicompress inspect model/

aicompress inspect w4/ --json

aicompress inspect model/ --analyze --group-size 128 --max-error 0.05"""


def command(
    source: o.Source,
    analyze: Annotated[
        bool, typer.Option("--analyze", help="Read the weights: distribution, rounding errors, proposed bits by layer.")
    ] = False,
    group_size: Annotated[
        int, typer.Option("--group-size", min=1, help="--analyze: columns that share a scale when layers are rounded.")
    ] = 64,
    max_error: Annotated[
        float, typer.Option("--max-error", min=0, help="--analyze: relative error that the proposed bits keep.")
    ] = 0.12,
    as_json: o.AsJson = False,
) -> None:
    """Show what a checkpoint holds: layers, forms, bytes, and the steps that made it."""
    from aicompress.checkpoint.statistics import is_statistics
    from aicompress.cli import render
    from aicompress.cli.boundary import resume_collector
    from aicompress.pipeline.analysis import Analysis
    from aicompress.pipeline.inspect import inspect
    from aicompress.report import numbers
    from aicompress.report.tables import method_of

    if is_statistics(Path(source)):
        _show_statistics(Path(source), as_json)
        return
    resume_collector()
    inspection = inspect(source, Analysis(group_size, max_error) if analyze else None)
    if as_json:
        print(json.dumps(dataclasses.asdict(inspection), indent=2, ensure_ascii=False))
        return
    side = inspection.side
    architecture = inspection.architecture or "no architecture named"
    print(f"{side.path}: {architecture}, {inspection.layout} layout")
    print(f"{numbers.exact_size(side.weight_bytes)}, {side.parameters:,} parameters")
    for warning in inspection.warnings:
        print(f"warning: {warning}")
    render.table(_parameters(inspection, analyze))
    if analyze:
        render.table(_rounding(inspection, max_error))
    totals = [(t.kind, t.count, t.numbers, t.nbytes) for t in inspection.totals]
    render.table(Table.of("By kind", ("kind", "tensors", "numbers", "bytes"), totals))
    steps = [(i, s.get("command"), method_of(s), s.get("tool")) for i, s in enumerate(inspection.lineage, 1)]
    if steps:
        render.table(Table.of("Steps that made it", ("", "command", "method", "tool"), steps))


def _parameters(inspection: Inspection, analyze: bool) -> Table:
    """A row per parameter; with --analyze its distribution."""
    headings = ["name", "kind", "form", "how", "shape", "dtype", "bits", "bytes"]
    spread = ["low", "high", "std", "kurtosis", "outliers", "zeros", "row spread"] if analyze else []
    rows = []
    for row in inspection.rows:
        shape = "×".join(map(str, row.shape))
        cells: list[object] = [
            row.name,
            row.kind,
            row.form,
            row.detail,
            shape,
            row.dtype,
            row.bits,
            row.nbytes,
        ]
        d = row.distribution
        if analyze:
            cells += [None] * len(spread) if d is None else [
                d.low, d.high, d.std, d.kurtosis, d.outliers, d.zeros, d.row_spread,
            ]  # fmt: skip
        rows.append(cells)
    return Table.of("Parameters", [*headings, *spread], rows)


def _rounding(inspection: Inspection, max_error: float) -> Table:
    """A row per layer: what rounding to nearest does to it."""
    headings = ["layer", "group", "peak / std", "kurtosis", "outliers", "levels of 16"]
    rows: list[list[object]] = []
    for row in inspection.rows:
        if (r := row.rounding) is not None and (d := row.distribution) is not None:
            plain: list[object] = [row.name, r.group, r.peak, d.kurtosis, d.outliers, r.levels]
            rows.append([*plain, *r.errors.values(), r.proposed])
    errors = next(([f"error at {bits}" for bits in r.errors] for row in inspection.rows if (r := row.rounding)), [])
    title = f"Rounding to nearest; proposed are the least bits whose error is within {max_error:g}"
    return Table.of(title, [*headings, *errors, "proposed"], rows)


def _show_statistics(path: Path, as_json: bool) -> None:
    """Print what a file of statistics holds: a row per layer."""
    from aicompress.checkpoint.statistics import StatisticsFile
    from aicompress.cli import render

    summary = StatisticsFile.open(path).summary()
    if as_json:
        print(json.dumps(summary, indent=2, ensure_ascii=False))
        return
    data = ", ".join(f"{source['path']} ({source['samples']} samples)" for source in summary["calibration"]["data"])
    print(f"{path}: statistics of inputs, from {data}")
    headings = ("layer", "rows", "inputs", "statistics", "largest / mean of x²", "dead inputs", "shared with")
    render.table(Table.of("", headings, [tuple(row.values()) for row in summary["layers"]]))
