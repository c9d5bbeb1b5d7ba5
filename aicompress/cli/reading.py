"""Print what inspect, verify and compare read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aicompress.cli import render
from aicompress.cli.boundary import resume_collector
from aicompress.disk import require_file, write_whole
from aicompress.errors import CheckpointError, CompressError, OutputExists, Refused, Unsupported
from aicompress.report import numbers
from aicompress.report.table import Table
from aicompress.report.tables import method_of

if TYPE_CHECKING:
    from aicompress.pipeline.inspect import Inspection
    from aicompress.report.model import Report


def show_inspection(source: str, as_json: bool, analysis: tuple[int, float] | None = None) -> None:
    """Print what a checkpoint, or a file of statistics, holds; its weights analyzed at a group size and an error."""
    from aicompress.checkpoint.statistics import is_statistics
    from aicompress.pipeline.analysis import Analysis
    from aicompress.pipeline.inspect import inspect

    if is_statistics(Path(source)):
        show_statistics(Path(source), as_json)
        return
    resume_collector()
    inspection = inspect(source, Analysis(*analysis) if analysis else None)
    if as_json:
        print(json.dumps(dataclasses.asdict(inspection), indent=2, ensure_ascii=False))
        return
    side = inspection.side
    architecture = inspection.architecture or "no architecture named"
    print(f"{side.path}: {architecture}, {inspection.layout} layout")
    print(f"{numbers.exact_size(side.weight_bytes)}, {side.parameters:,} parameters")
    for warning in inspection.warnings:
        print(f"warning: {warning}")
    render.table(_parameters(inspection, analysis is not None))
    if analysis:
        render.table(_rounding(inspection, analysis[1]))
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


def show_statistics(path: Path, as_json: bool) -> None:
    """Print what a file of statistics holds: a row per layer."""
    from aicompress.checkpoint.statistics import StatisticsFile

    summary = StatisticsFile.open(path).summary()
    if as_json:
        print(json.dumps(summary, indent=2, ensure_ascii=False))
        return
    data = ", ".join(f"{source['path']} ({source['samples']} samples)" for source in summary["calibration"]["data"])
    print(f"{path}: statistics of inputs, from {data}")
    headings = ("layer", "rows", "inputs", "statistics", "largest / mean of x²", "dead inputs", "shared with")
    render.table(Table.of("", headings, [tuple(row.values()) for row in summary["layers"]]))


def show_verification(source: str, as_json: bool) -> None:
    """Print what was checked; problems make the command fail.

    Raises:
        CheckpointError: the checkpoint is not sound.
    """
    from aicompress.pipeline.verify import verify

    resume_collector()
    verification = verify(source)
    if as_json:
        print(
            json.dumps({**dataclasses.asdict(verification), "sound": verification.sound}, indent=2, ensure_ascii=False)
        )
    else:
        for line in (*verification.checks, *(f"note: {note}" for note in verification.notes)):
            print(line)
        for problem in verification.problems:
            print(f"problem: {problem}")
    if verification.unread and not verification.problems:
        raise Unsupported(f"{source} cannot be decoded, so it is not judged: {verification.unread}", _NOT_READ)
    if not verification.sound:
        count = len(verification.problems)
        message = f"{source} is not sound: {count} problem{'s' if count > 1 else ''}"
        raise CheckpointError(message, "download it, or run the step that wrote it, again")
    if not as_json:
        print(f"{source} is sound")


_NOT_READ = "`aicompress inspect` lists what it holds; verify the checkpoint that it was made from"


def compare_reports(paths: Sequence[Path], as_markdown: bool, html: Path | None) -> None:
    """Print reports side by side, as a table, Markdown or a page."""
    from aicompress.report import compare
    from aicompress.report.html import comparison_to_html

    if html is not None:
        require_file(html)
    compared = compare.comparison([_report(path) for path in paths])
    if html is not None:
        _require_own_page(html)
        write_whole({html: comparison_to_html(compared)})
    if as_markdown:
        print(compare.to_markdown(compared))
        return
    render.table(compare.table(compared))
    for line in (compare.legend(compared), *compared.notes):
        if line:
            print(line)


def _require_own_page(path: Path) -> None:
    """Refuse to replace a file that is no page of a comparison.

    Raises:
        OutputExists: it is another one.
    """
    if path.is_file() and b"<title>Comparison of " not in path.read_bytes()[:1000]:
        raise OutputExists(f"aicompress did not write {path}", "nothing else is ever replaced: choose another FILE")


def _report_in(folder: Path) -> Path:
    """The report of what made a folder: a packed one holds that of its input as well."""
    names = ("pack.report.json", "report.json", "unpack.report.json")
    return next((folder / name for name in names if (folder / name).is_file()), folder / "report.json")


def _report(path: Path) -> Report:
    from aicompress.report.model import Report

    file = _report_in(path) if path.is_dir() else path
    if file.suffix == ".safetensors":
        file = file.with_name(f"{file.name.removesuffix('.safetensors')}.report.json")
    try:
        return Report.from_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise Refused(
            f"{file} cannot be read: {reason}", "name a report.json, or a checkpoint that holds one"
        ) from error
    except CompressError as error:
        raise Refused(f"{file}: {error.message}", error.hint) from error
