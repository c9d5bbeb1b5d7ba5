"""Bytes and parameters of a checkpoint on disk: one side of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.naming import byte_kind, kind_of
from aicompress.layer import Kind
from aicompress.measure import directory_nbytes
from aicompress.pipeline.step.checks import stored_outline
from aicompress.report.model import Side

GRIDS = {"scale", "zero", "point"}  # last words of the tensors that place codes: scales and zero points


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
    parameters = weights = 0
    shown = checkpoint.parameters()
    for name in (*shown, *checkpoint.copies):
        spec = shown[checkpoint.copies.get(name, name)]
        kind = kinds[name] if kinds is not None and name in kinds else kind_of(name, spec)
        parameters += stored_numbers(checkpoint, name) if name in shown else 0
        weights += math.prod(spec.shape) if name in shown else 0
        for suffix, disk in checkpoint.stored_names(name).items():
            row = "scale" if suffix.rpartition("_")[2] in GRIDS else byte_kind(disk, kind)
            by_kind[row] = by_kind.get(row, 0) + checkpoint.tensors[disk].spec.nbytes
    weight_bytes = sum(file.stat().st_size for file in checkpoint.source.files)
    by_kind["header"] = weight_bytes - sum(by_kind.values())
    folder = checkpoint.source.folder
    # A report cannot count itself: the one of an input is left out as well.
    reports = [] if folder is None else [folder / f"report.{kind}" for kind in ("json", "md", "html")]
    everything = weight_bytes if folder is None else directory_nbytes(folder)
    everything -= sum(file.stat().st_size for file in reports if file.is_file())
    return Side(path, everything, weight_bytes, parameters, by_kind, sha256 or {}, weights=weights)


def stored_numbers(checkpoint: Checkpoint, name: str) -> int:
    """How many numbers a parameter stores: all of a plain tensor, of a compressed one what its form says."""
    outline = stored_outline(checkpoint, name)
    return math.prod(checkpoint.tensors[name].spec.shape) if outline is None else outline.numbers()
