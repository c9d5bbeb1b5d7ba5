"""Bytes and parameters of a checkpoint on disk: one side of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.naming import byte_kind, kind_among
from aicompress.layer import Kind
from aicompress.measure import directory_nbytes
from aicompress.pipeline.step.checks import stored_outline
from aicompress.report.model import Side


def side_of(
    checkpoint: Checkpoint, kinds: Mapping[str, Kind | None] | None, path: str, sha256: dict[str, str] | None = None
) -> Side:
    """Bytes, parameters and bytes by kind of a checkpoint on disk.

    Args:
        checkpoint: an open checkpoint.
        kinds: what a model definition says of its parameters.
        path: how the report names it.
        sha256: digests of its weight files, if known.
    """
    by_kind: dict[str, int] = {}
    parameters = 0
    shown = checkpoint.parameters()
    for name in (*shown, *checkpoint.copies):
        spec = shown[checkpoint.copies.get(name, name)]
        kind = kind_among(kinds, name, spec)
        parameters += stored_numbers(checkpoint, name) if name in shown else 0
        for disk in checkpoint.stored_names(name).values():
            row = byte_kind(disk, kind) if disk == name or "scale" not in disk else "scale"
            by_kind[row] = by_kind.get(row, 0) + checkpoint.tensors[disk].spec.nbytes
    weight_bytes = sum(file.stat().st_size for file in checkpoint.source.files)
    by_kind["header"] = weight_bytes - sum(by_kind.values())
    everything = directory_nbytes(checkpoint.source.folder) if checkpoint.source.folder else weight_bytes
    return Side(path, everything, weight_bytes, parameters, by_kind, sha256 or {})


def stored_numbers(checkpoint: Checkpoint, name: str) -> int:
    """How many numbers a parameter stores: all of a plain tensor, of a compressed one what its form says."""
    outline = stored_outline(checkpoint, name)
    return math.prod(checkpoint.tensors[name].spec.shape) if outline is None else outline.numbers()
