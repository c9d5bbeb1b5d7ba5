"""Parameters of a method for each block of rows, where what becomes of a row depends on other rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from aicompress.methods.layerwise import AnyLayerMethod
from aicompress.pipeline.layerwise.compress import Compression
from aicompress.pipeline.layerwise.rows import reading
from aicompress.pipeline.step.layer_plan import LayerPlan


def parted(method: AnyLayerMethod, job: LayerPlan) -> bool:
    """Whether a layer's blocks of rows have configs of their own, if it is done in blocks."""
    if job.config is None:
        return False
    if job.group is not None:
        return method.shares is not None and method.shares.divided is not None
    return method.row_wise is not None and method.row_wise.parted(job.config)


def configs(compression: Compression, jobs: Sequence[LayerPlan], parts: Sequence[Sequence[slice]]) -> Sequence[Any]:
    """The config of every block of rows, first rows first.

    Args:
        compression: of the step.
        jobs: a layer, or all layers of a group.
        parts: the blocks of each.
    """
    method, first, count = compression.method, jobs[0], max(map(len, parts))
    if count == 1 or not parted(method, first):
        return [first.config] * count
    blocks = [
        [partial(reading.read, compression, job, rows) for rows in its] for job, its in zip(jobs, parts, strict=True)
    ]
    if first.group is not None:
        assert method.shares is not None
        assert method.shares.divided is not None
        return method.shares.divided([job.info for job in jobs], blocks, first.config)
    assert method.row_wise is not None
    assert method.row_wise.divided is not None
    return method.row_wise.divided(first.info, blocks[0], first.config)
