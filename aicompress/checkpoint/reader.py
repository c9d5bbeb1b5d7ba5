"""A checkpoint read lazily: headers at once, each tensor's bytes when asked for, nothing kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from aicompress.checkpoint.checkpoint_headers import CheckpointHeaders
from aicompress.checkpoint.described import description
from aicompress.checkpoint.files import (
    digests,
    read_headers,
    read_part,
    read_rows,
    read_tensor,
    require_finite,
    require_likely,
)
from aicompress.checkpoint.header import DTYPE_NAMES, DTYPES
from aicompress.checkpoint.manifest import Entry
from aicompress.checkpoint.source import locate
from aicompress.errors import CheckpointError, first_line
from aicompress.layer import Layer, LayerInfo, as_matrix
from aicompress.weights import Dense, Weight, fixed_width
from aicompress.weights.coding.rows import StoredTensor
from aicompress.weights.form import unnest
from aicompress.weights.stored.entropy import in_fixed_width

OPENED = 8  # compressed parameters of which is kept what parts of them told: more than a step works on at once
NONSENSE = (RuntimeError, ValueError, TypeError, KeyError, IndexError)  # what restoring it raises


@dataclass(frozen=True)
class Checkpoint(CheckpointHeaders):
    """An open checkpoint: what its headers show, and data as it is asked for."""

    @classmethod
    def open(cls, name: str | Path) -> Checkpoint:
        """Open a checkpoint: headers and JSON only.

        Raises:
            CheckpointError: missing, damaged, or in a format this version does not read.
        """
        source = locate(name)
        tensors, metadata = read_headers(source)
        specs = {name: ref.spec for name, ref in tensors.items()}
        told = description(source, specs, lambda name: read_tensor(tensors[name], name), metadata)
        foreign = told.weights(tensors, source.path)
        manifest = replace(told.manifest, entries={**told.manifest.entries, **foreign.entries()})
        opened = cls(source, foreign.shown(tensors), manifest, told.layout, metadata, {}, foreign)
        opened._check_entries()
        return opened

    @property
    def original(self) -> Checkpoint:
        """The checkpoint as its files are."""
        return self

    def _check_entries(self) -> None:
        """Every compressed parameter has its tensors, and they have the dtypes and shapes that its form needs."""
        for name, entry in self.manifest.entries.items():
            names = self.stored_names(name)
            lost = [disk for disk in names.values() if disk not in self.tensors]
            if lost or not names:
                what = f"{lost[0]!r}, which it shares" if lost and lost[0] in entry.shared.values() else "tensors"
                message = f"{self.path}: compressed parameter {name!r} lacks {what}"
                raise CheckpointError(message, "the file is incomplete")
            if self.foreign.is_kept(name):
                continue  # its layout has looked at them
            try:
                outline = self.restored(name, entry, self.no_data)
                whole = as_matrix(torch.empty(entry.dense.shape, device="meta"), entry.transposed)
                stacked = whole if entry.transposed else whole.reshape(-1, entry.dense.shape[-1])  # of experts
                fits = tuple(outline.shape) in (tuple(whole.shape), tuple(stacked.shape))
                fits &= entry.dense.dtype.is_floating_point
                outline.dense()  # without data: it fails where tensors do not fit one another
                if self.layout == "native":
                    fits &= outline.specs() == {suffix: self.tensors[disk].spec for suffix, disk in names.items()}
            except NONSENSE as error:
                raise self._inconsistent(name, f": {first_line(error)}") from error
            if not fits:
                raise self._inconsistent(name)
            stored = sum(self.tensors[disk].spec.nbytes for disk in names.values())
            require_likely(entry.dense.nbytes, stored, name, self.path)

    def _inconsistent(self, name: str, why: str = "") -> CheckpointError:
        return CheckpointError(
            f"{self.path}: the tensors of compressed parameter {name!r} are not what its description says{why}",
            "download or write the checkpoint again",
        )

    def read(self, name: str) -> Tensor:
        """Read one tensor from disk into fresh memory; a weight of a foreign layout that has no form is decoded.

        Raises:
            CheckpointError: the file cannot be read, or shrank since it was opened.
        """
        if self.foreign.is_decoded(name):
            return self.foreign.tensor(name)
        return read_tensor(self.tensors[name], name)

    def factors(self, parameter: str) -> Tensor | None:
        """What every element of a parameter is multiplied by as it is read; None where it is as the file has it."""
        return None

    def is_plain(self, parameter: str) -> bool:
        """Whether a file holds a parameter as it is read, so that a part of it can be read alone."""
        return parameter not in self.manifest.entries and parameter not in self.foreign.weights

    def rows(self, name: str, start: int, stop: int, axis: int = 0) -> Tensor:
        """Read some entries of a parameter that has no form of its own, along its row axis; errors as of `read`.

        Args:
            name: the parameter.
            start, stop: the first entry, and the one after the last.
            axis: that the rows of a plain one lie along.
        """
        if self.is_plain(name):
            return read_part(self.tensors[name], name, slice(start, stop), axis)
        if self.row_multiple(name):
            return self.foreign.tensor(name, slice(start, stop))
        return self.read(name).narrow(self.row_axis(name), start, stop - start)

    def weight(self, parameter: str, rows: slice | None = None, part: str = "") -> Weight:
        """A parameter in the form it is stored in, as a matrix (out, in); what is entropy-coded has its fixed width.

        Args:
            parameter: its name.
            rows: entries of its row axis, as `row_multiple` lets them be read alone; None: all of them.
            part: a part of its weight, of which these are rows; '' for all of it.

        Raises:
            CheckpointError: a compressed parameter is not what its description says, or a scale, factor or value of it
                is NaN or infinite.
        """
        entry = self.manifest.entries.get(parameter)
        if entry is None:
            return Dense(
                as_matrix(self.read(parameter) if rows is None else self.rows(parameter, rows.start, rows.stop))
            )
        try:
            if part:
                weight = self._part(parameter, part, rows)
            elif self.foreign.is_kept(parameter):
                weight = self.foreign.weight(parameter, rows)
            elif rows is None:
                weight = fixed_width(self.restored(parameter, entry, self.read))
            else:
                weight = self._restored_rows(parameter, entry, rows)
        except NONSENSE as error:
            raise CheckpointError(
                f"{self.path}: {parameter!r} cannot be decoded: {first_line(error)}",
                "download or write the checkpoint again",
            ) from error
        for suffix, tensor in weight.tensors().items():
            require_finite(tensor, f"{parameter}{suffix and '.'}{suffix}", self.path)
        return weight

    def _part(self, parameter: str, part: str, rows: slice | None) -> Weight:
        """A part of a compressed parameter, or some rows of it."""
        outline, stored = self.in_parts(parameter)
        parts = outline.parts()
        own, others = parts[part], parts.keys() - {"out"}
        if part == "out":
            tensors = {suffix: tensor for suffix, tensor in stored.items() if suffix.partition("_")[0] not in others}
        else:
            tensors = unnest(part, stored)
        return own.read(tensors) if rows is None else own.read_rows(tensors, rows)

    def _restored_rows(self, parameter: str, entry: Entry, rows: slice) -> Weight:
        """Some rows of a compressed parameter, of which only those are read."""
        each, total = self.rows_each(parameter), entry.dense.shape[self.row_axis(parameter)]
        if self.layout != "compressed-tensors":
            outline, stored = self.in_parts(parameter)
            return outline.read_rows(stored, slice(rows.start * each, rows.stop * each))

        def read(disk: str) -> Tensor:
            axis = None if disk.endswith(".weight_shape") else 0
            return read_rows(self.tensors[disk], disk, axis, rows, total)

        meta = {**entry.meta, "shape": [rows.stop - rows.start, entry.meta["shape"][1]]}
        return self.restored(parameter, replace(entry, meta=meta), read)

    @cached_property
    def in_parts(self) -> Callable[[str], tuple[Weight, dict[str, StoredTensor]]]:
        """Gives the outline of a compressed parameter, codes of a fixed width, and its tensors by suffix.

        What parts of these tell of the others is kept of a few parameters: where a stream is left, what masks count.
        """
        return lru_cache(OPENED)(self._in_parts)

    def _in_parts(self, parameter: str) -> tuple[Weight, dict[str, StoredTensor]]:
        outline, names = self.stored_outline(parameter), self.stored_names(parameter)
        assert outline is not None
        stored = {suffix: self._stored_tensor(name) for suffix, name in names.items()}
        return fixed_width(outline), in_fixed_width(outline, stored)

    def _stored_tensor(self, name: str) -> StoredTensor:
        ref = self.tensors[name]

        def read(part: slice | None, axis: int = 0) -> Tensor:
            return read_tensor(ref, name) if part is None else read_part(ref, name, part, axis)

        return StoredTensor(read, ref.spec.shape[0] if ref.spec.shape else 1)

    def dense(self, parameter: str, rows: slice | None = None) -> Tensor:
        """A parameter, or some entries of its row axis, as the dense tensor it stands for, in its own dtype."""
        entry = self.manifest.entries.get(parameter)
        if entry is None:
            return self.read(parameter) if rows is None else self.rows(parameter, rows.start, rows.stop)
        return entry.decode(self.weight(parameter, rows), None if rows is None else rows.stop - rows.start)

    def layer(self, info: LayerInfo, seed: int = 0, weight: Weight | None = None) -> Layer:
        """Read a layer for a method: a float32 matrix and its stored form.

        Args:
            info: the layer.
            seed: of the method's random numbers.
            weight: its parameter as `weight` gives it, where that has been read already.

        Raises:
            CheckpointError: the weight holds NaN or infinity.
        """
        stored = self.weight(info.tensor) if weight is None else weight
        if info.part:
            stored = stored.parts()[info.part]
        matrix = stored.dense()
        if isinstance(stored, Dense) and not info.part:  # factors are (out, rank), (rank, in)
            matrix, stored = info.matrix(matrix).contiguous(), Dense(info.matrix(stored.matrix))
        require_finite(matrix, info.name, self.path)
        return Layer(info, matrix, stored, seed=seed)


__all__ = ["DTYPES", "DTYPE_NAMES", "Checkpoint", "digests", "require_finite"]
