"""Summarize a planned step for a dry run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from aicompress.checkpoint import Checkpoint
from aicompress.pipeline.step.output import Output
from aicompress.report.model import LayerRow
from aicompress.report.plan import PlanRow, PlanSummary


def summarize(
    output: Output, checkpoint: Checkpoint, rows: list[PlanRow], unchanged: int, warnings: tuple[str, ...]
) -> PlanSummary:
    """The summary of a plan: layers that change, the exact bytes of every file, warnings."""
    step = output.manifest.lineage[-1]
    files = {shard.name: shard.nbytes for shard in output.shards}
    if output.destination.single:
        files = {output.destination.path.name: output.weight_bytes}
    before = sum(file.stat().st_size for file in checkpoint.source.files)
    source, out = str(checkpoint.path), str(output.destination.path)
    return PlanSummary(
        command=step["command"],
        source=source,
        out=out,
        method=step["recipe"]["method"],
        rows=tuple(rows),
        unchanged=unchanged,
        weight_files=files,
        other_bytes=output.other_bytes,
        bytes_before=before,
        warnings=warnings,
        layout=output.layout,
        readers=output.readers,
        notes=checkpoint.foreign.merged,
        at_most=output.entropy_coded,
    )


def summarize_rows(
    output: Output,
    checkpoint: Checkpoint,
    rows: Sequence[LayerRow],
    stored: Mapping[str, str],
    warnings: tuple[str, ...],
) -> PlanSummary:
    """The summary of a plan from the rows its report will have; `stored` names each layer's form in the input."""
    shown = [
        PlanRow(r.name, r.kind, r.rule, stored[r.name], r.form, r.detail, r.bytes_before, r.bytes_after)
        for r in rows
        if r.method != "-"
    ]
    return summarize(output, checkpoint, shown, len(rows) - len(shown), warnings)
