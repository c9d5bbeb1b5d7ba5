"""Build, render and read the report of a command."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from aicompress import __version__
from aicompress.checkpoint.source import REPORTS
from aicompress.checkpoint.writer import CheckpointWriter
from aicompress.disk import report_path
from aicompress.measure import peak_rss
from aicompress.pipeline.step.environment import environment
from aicompress.pipeline.step.output import Output
from aicompress.recipe import Recipe
from aicompress.recipe.distillation import DistillRecipe
from aicompress.recipe.evaluation import EvalRecipe
from aicompress.recipe.made import MadeRecipe
from aicompress.report import gates
from aicompress.report.markdown import to_markdown
from aicompress.report.model import Baseline, Latency, LayerRow, Report, Side, Untouched


@dataclass(frozen=True)
class Results:
    """What a command has done and measured: sections of its report, which `Report` describes."""

    layers: tuple[LayerRow, ...] = ()
    warnings: tuple[str, ...] = ()
    latency: Latency | None = None
    quality: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    bits: dict[str, Any] = field(default_factory=dict)
    vocabulary: dict[str, Any] = field(default_factory=dict)
    untouched: Untouched | None = None
    baselines: tuple[Baseline, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)
    waited: float | None = None
    notes: tuple[str, ...] = ()


def build_report(
    command: str,
    recipe: Recipe | DistillRecipe | MadeRecipe | EvalRecipe,
    sides: tuple[Side | None, Side],
    lineage: Sequence[dict[str, Any]],
    results: Results,
    seconds: float,
) -> Report:
    """The report of a command, with the recipe's gates evaluated.

    Args:
        command: factorize, quantize, prune, distill or eval.
        recipe: what was asked for.
        sides: the checkpoint before, and the one after.
        lineage: steps that made the one after.
        results: what was done and measured.
        seconds: wall time of the command.
    """
    results = replace(results, warnings=(*results.warnings, *_of_sources(results)))
    report = Report(
        command=command,
        tool_version=__version__,
        before=sides[0],
        after=sides[1],
        gates=(),
        environment=environment(),
        recipe=recipe.resolved(),
        lineage=tuple(lineage),
        seconds=seconds,
        peak_rss=peak_rss(),
        **vars(results),
    )
    return replace(report, gates=gates.evaluate(recipe.gates, report))


def _of_sources(results: Results) -> Iterator[str]:
    """Warnings of sources that held rows of nothing, or fewer or shorter samples than were asked for."""
    training = results.training.get("data")
    records = [*results.calibration.get("data", []), *results.data.values(), *([training] if training else [])]
    for path, record in {record["path"]: record for record in records}.items():
        if record.get("skipped"):
            yield f"{path}: rows that are null or empty are left out: {record['skipped']:,}"
        if (asked := record.get("asked") or 0) > record["samples"]:
            yield f"{path}: it holds fewer samples than are asked for: {record['samples']:,} of {asked:,}"
        if record.get("length"):
            yield f"{path}: it holds fewer tokens than a sample is to have: samples are {record['length']} tokens long"


def add_report(report: Report, html: bool, writer: CheckpointWriter, prefix: str = "") -> Report:
    """Add the files of a report to an output, and return it with the names of all files where that is a folder."""
    if not writer.single:
        names = [f"{prefix}{name}" for name in REPORTS if html or not name.endswith(".html")]
        report = replace(report, files=(*writer.names(), *names))
    for name, text in rendered(report, html).items():
        writer.add(f"{prefix}{name}", text.encode(errors="backslashreplace"))
    return report


def rendered(report: Report, html: bool = True) -> dict[str, str]:
    """The report's files by name; without `html` no page is made."""
    files = {"report.json": report.to_json(), "report.md": to_markdown(report)}
    if not html:
        return files
    from aicompress.report.html import to_html  # with what draws plots

    return {**files, "report.html": to_html(report)}


def written_report(output: Output) -> Report:
    """The report of an output that another process has written."""
    return Report.from_json(report_path(output.destination.path).read_text(encoding="utf-8"))
