"""Bytes and parameters of a checkpoint on disk: one side of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.naming import kinds_among
from aicompress.layer import Kind
from aicompress.measure import directory_nbytes
from aicompress.report.model import Side

# Last words of the tensors that place codes, scales and zero points: of stored forms, and in other tools' layouts.
GRIDS = {"scale", "zero", "point"}
FOREIGN_GRIDS = {*GRIDS, "inv", "scales", "qzeros", "absmax", "map", "state", "SCB"}


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
    layer_kinds = kinds_among(kinds, checkpoint.parameters())
    for name, spec in checkpoint.parameters().items():
        parameters += stored_numbers(checkpoint, name)
        weights += math.prod(spec.shape)
        grids = _grids(checkpoint, name)
        for disk, stored in checkpoint.stored_specs(name).items():
            row = "scale" if disk in grids else layer_kinds[name] or "other"
            by_kind[row] = by_kind.get(row, 0) + stored.nbytes
    beside = [stored.nbytes for copy in checkpoint.copies for stored in checkpoint.stored_specs(copy).values()]
    beside += [checkpoint.foreign.refs[rider].spec.nbytes for rider in checkpoint.foreign.riders]
    if beside:
        by_kind["other"] = by_kind.get("other", 0) + sum(beside)
    weight_bytes = sum(file.stat().st_size for file in checkpoint.source.files)
    by_kind["header"] = weight_bytes - sum(by_kind.values())
    folder = checkpoint.source.folder
    # A report cannot count itself: the one of an input is left out as well.
    reports = [] if folder is None else [folder / f"report.{kind}" for kind in ("json", "md", "html")]
    everything = weight_bytes if folder is None else directory_nbytes(folder)
    everything -= sum(file.stat().st_size for file in reports if file.is_file())
    return Side(path, everything, weight_bytes, parameters, by_kind, sha256 or {}, weights=weights)


def _grids(checkpoint: Checkpoint, name: str) -> set[str]:
    """Those of a parameter's tensors on disk that hold scales and zero points."""
    if name in checkpoint.foreign.weights:
        ends = ((disk, disk.rpartition(".")[2].rpartition("_")[2]) for disk in checkpoint.stored_specs(name))
        return {disk for disk, word in ends if word in FOREIGN_GRIDS and disk != name}
    return {disk for suffix, disk in checkpoint.stored_names(name).items() if suffix.rpartition("_")[2] in GRIDS}


def stored_numbers(checkpoint: Checkpoint, name: str) -> int:
    """How many numbers a parameter stores itself: all of a plain tensor, of a compressed one what its form says."""
    outline = checkpoint.outline(name)
    if outline is None:
        return math.prod(checkpoint.tensors[name].spec.shape)
    lent = (outline.parts()[part] if part else outline for part in checkpoint.manifest.owners(name))
    return outline.numbers() - sum(weight.numbers() for weight in lent)
