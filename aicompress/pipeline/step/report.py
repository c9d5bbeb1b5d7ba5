"""The end of every step: measure what was written, write the report inside it, seal it, judge the gates."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from aicompress import __version__
from aicompress.checkpoint import Checkpoint, CheckpointWriter
from aicompress.checkpoint.reader import digests
from aicompress.layer import Kind
from aicompress.measure import peak_rss
from aicompress.pipeline.step.environment import environment
from aicompress.pipeline.step.latency import compare
from aicompress.pipeline.step.options import Mode
from aicompress.pipeline.step.output import Output
from aicompress.pipeline.step.sides import side_of
from aicompress.report import gates
from aicompress.report.markdown import to_markdown
from aicompress.report.model import LayerRow, Report


@dataclass(frozen=True)
class Facts:
    """What a driver knows when its last tensor is written.

    Attributes:
        recipe: the resolved recipe.
        checkpoint: the input.
        kinds: what the model definition says of the input's parameters.
        layers: a row for each layer.
        warnings: from the plan and the run.
        start: perf_counter at the start.
        quality, training: figures of steps that measure or train.
        calibration: where the statistics of a calibrated step came from.
        bits: what a search for widths found.
    """

    recipe: Any
    checkpoint: Checkpoint
    kinds: Mapping[str, Kind | None] | None
    layers: tuple[LayerRow, ...]
    warnings: tuple[str, ...]
    start: float
    quality: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    bits: dict[str, Any] = field(default_factory=dict)


def finish(facts: Facts, output: Output, writer: CheckpointWriter, latency: Mode) -> Report:
    """Write the remaining files and the report, and rename the output into place."""
    output.write_files(writer)
    if output.metadata():
        writer.stamp(output.metadata())
    written = Checkpoint.open(writer.work / output.shards[0].name if output.destination.single else writer.work)
    report = _report(facts, output, written, latency)
    for name, text in rendered(report, facts.recipe.report.html).items():
        writer.add(name, text.encode())
    writer.seal()
    return report


def _digests(output: Output, written: Checkpoint) -> dict[str, str]:
    """sha256 of the weight files under the names they will have."""
    found = digests(written.source)
    return (
        dict(zip([output.destination.path.name], found.values(), strict=True)) if output.destination.single else found
    )


def rendered(report: Report, html: bool = True) -> dict[str, str]:
    """The report's files by name; without `html` no page is made."""
    files = {"report.json": report.to_json(), "report.md": to_markdown(report)}
    if not html:
        return files
    from aicompress.report.html import to_html  # with what draws plots

    return {**files, "report.html": to_html(report)}


def written_report(output: Output) -> Report:
    """The report beside an output that another process has written."""
    out = output.destination.path
    path = out.parent / f"{out.stem}.report.json" if output.destination.single else out / "report.json"
    return Report.from_json(path.read_text(encoding="utf-8"))


def _report(facts: Facts, output: Output, written: Checkpoint, mode: Mode) -> Report:
    step = output.manifest.lineage[-1]
    seconds = time.perf_counter() - facts.start  # timing forward passes is not part of the step
    try:
        latency, notes = compare(facts.checkpoint, written, mode)
    except Exception as error:  # the output is complete: a model that does not run must not cost it
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        latency, notes = None, [f"latency was not measured: {type(error).__name__}: {reason}"]
    after = side_of(written, facts.kinds, str(output.destination.path), _digests(output, written))
    after = replace(after, bytes=output.weight_bytes + output.other_bytes)  # a report cannot count itself
    report = Report(
        command=step["command"],
        tool_version=__version__,
        before=side_of(facts.checkpoint, facts.kinds, str(facts.checkpoint.path), dict(step["inputs"])),
        after=after,
        layers=facts.layers,
        latency=latency,
        quality=facts.quality,
        training=facts.training,
        warnings=(*facts.warnings, *notes),
        gates=(),
        environment=environment(),
        recipe=facts.recipe.resolved(),
        lineage=output.manifest.lineage,
        seconds=seconds,
        peak_rss=peak_rss(),
        calibration=facts.calibration,
        bits=facts.bits,
    )
    return replace(report, gates=gates.evaluate(facts.recipe.gates, report))
