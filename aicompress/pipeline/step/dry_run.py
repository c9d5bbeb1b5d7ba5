"""Summarize a planned step for a dry run."""

from __future__ import annotations

from aicompress.checkpoint import Checkpoint
from aicompress.pipeline.step.output import Output
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
