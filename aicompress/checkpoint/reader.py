"""A checkpoint read lazily: headers at once, each tensor's bytes when asked for, nothing kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aicompress.checkpoint.compressed_tensors.entries import CT_SUFFIXES, ct_restore
from aicompress.checkpoint.described import description
from aicompress.checkpoint.files import digests, first_line, read_headers, read_tensor, require_finite, require_likely
from aicompress.checkpoint.foreign.reading import ForeignWeights
from aicompress.checkpoint.header import DTYPE_NAMES, DTYPES, TensorRef
from aicompress.checkpoint.layouts import native_names
from aicompress.checkpoint.manifest import Entry, Manifest
from aicompress.checkpoint.naming import is_transposed, kinds_among, layer_name
from aicompress.checkpoint.source import Source, locate
from aicompress.errors import CheckpointError, Unsupported
from aicompress.layer import Kind, Layer, LayerInfo, as_matrix
from aicompress.weights import Dense, TensorSpec, Weight, fixed_width, form_of

NONSENSE = (RuntimeError, ValueError, TypeError, KeyError, IndexError)  # what restoring it raises


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    Attributes:
        source: its files.
        tensors: every tensor on disk, by name.
        manifest: compressed parameters, and the steps that made this checkpoint.
        layout: how the compressed parameters are named: plain, native or compressed-tensors.
        metadata: strings of the first file's header.
        copies: parameters that are copies of others they are tied to, copy -> original; they are not shown.
        foreign: parameters in layouts of other tools.
    """

    source: Source
    tensors: dict[str, TensorRef]
    manifest: Manifest
    layout: str
    metadata: dict[str, str]
    copies: dict[str, str] = field(default_factory=dict)
    foreign: ForeignWeights = field(default_factory=ForeignWeights)

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
    def path(self) -> Path:
        return self.source.path

    @property
    def original(self) -> Checkpoint:
        """The checkpoint as its files are."""
        return self

    @property
    def config(self) -> dict[str, Any] | None:
        return self.source.config

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Dtype and shape of every tensor on disk."""
        return {name: ref.spec for name, ref in self.tensors.items()}

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

    def stored_names(self, parameter: str) -> dict[str, str]:
        """Suffix -> name on disk of all tensors a parameter is made of; a dense parameter has one, under ''."""
        if self.foreign.is_kept(parameter):
            return dict(self.foreign.weights[parameter].names)
        if parameter in self.manifest.entries and self.layout == "compressed-tensors":
            module = parameter.removesuffix(".weight")
            return {suffix: f"{module}.{suffix}" for suffix in CT_SUFFIXES if f"{module}.{suffix}" in self.tensors}
        if parameter in self.manifest.entries:
            entry = self.manifest.entries[parameter]
            return {**native_names(parameter, entry.suffixes), **entry.shared}
        return {"": parameter} if parameter in self.tensors else {}

    def own_names(self, parameter: str) -> dict[str, str]:
        """Those of `stored_names` that lie under the parameter's own name, and not under another's."""
        shared = self.manifest.entries[parameter].shared if parameter in self.manifest.entries else {}
        return {suffix: name for suffix, name in self.stored_names(parameter).items() if suffix not in shared}

    def parameters(self) -> Mapping[str, TensorSpec]:
        """Logical parameters in file order, each as the dense tensor it stands for."""
        return self._parameters

    @cached_property
    def _parameters(self) -> Mapping[str, TensorSpec]:
        entries = self.manifest.entries
        owner = {disk: name for name in entries for disk in self.own_names(name).values()}
        names = dict.fromkeys(owner.get(disk, disk) for disk in self.tensors)
        specs = {name: entries[name].dense if name in entries else self.tensors[name].spec for name in names}
        return MappingProxyType({name: spec for name, spec in specs.items() if name not in self.copies})

    def nbytes(self, parameter: str) -> int:
        """Bytes on disk of the tensors that a parameter stores itself."""
        return sum(spec.nbytes for spec in self.stored_specs(parameter).values())

    def stored_specs(self, parameter: str) -> dict[str, TensorSpec]:
        """Dtypes and shapes of the tensors that a parameter stores itself, by their names on disk."""
        if parameter in self.foreign.weights:
            return self.foreign.specs(parameter)
        return {name: self.tensors[name].spec for name in self.own_names(parameter).values()}

    def outline(self, parameter: str) -> Weight | None:
        """A compressed parameter in the form it is read in, without data; None for a plain one."""
        stored = self.stored_outline(parameter)
        return None if stored is None else fixed_width(stored)

    def stored_outline(self, parameter: str) -> Weight | None:
        """The same in the form that the files hold, where codes may be entropy-coded."""
        if parameter in self.foreign.weights:
            return self.foreign.weights[parameter].outline
        entry = self.manifest.entries.get(parameter)
        return None if entry is None else self.restored(parameter, entry, self.no_data)

    @property
    def entropy_coded(self) -> bool:
        """Whether some of its codes are entropy-coded."""
        outlines = (self.stored_outline(name) for name in self.manifest.entries)
        return any(outline is not None and fixed_width(outline) is not outline for outline in outlines)

    def layers(self, kinds: Mapping[str, Kind | None] | None = None) -> list[LayerInfo]:
        """Every layer, in file order; a low-rank layer gives its two factors.

        Args:
            kinds: what a model definition says of parameters; names it lacks are judged by name and shape.
        """
        parameters = self.parameters()
        by_name = kinds_among(kinds, parameters)
        return [info for name, kind in by_name.items() if kind for info in self._infos(name, parameters[name], kind)]

    def _infos(self, name: str, spec: TensorSpec, kind: Kind) -> list[LayerInfo]:
        entry = self.manifest.entries.get(name)
        transposed = entry.transposed if entry else kind == "linear" and is_transposed(name, self.config)
        columns = spec.shape[-1] if kind == "experts" else int(np.prod(spec.shape[1:]))
        shape = (int(np.prod(spec.shape)) // columns, columns)
        outline, stored, owners = self.outline(name), self.stored_outline(name), self.manifest.owners(name)
        form = Dense.form if outline is None else outline.form
        whole = LayerInfo(
            layer_name(name), name, kind, shape[::-1] if transposed else shape, spec.shape, spec.dtype, transposed,
            "", form, self.nbytes(name), outline, owners.get("", ""),
        )  # fmt: skip
        if outline is None or stored is None or not outline.parts():
            return [whole]
        return [
            LayerInfo(
                f"{whole.name}.{form}.{part}", name, kind, weight.shape, spec.shape, spec.dtype, transposed,
                part, weight.form, 0 if part in owners else stored.part_nbytes(part), weight, owners.get(part, ""),
            )
            for part, weight in outline.parts().items()
        ]  # fmt: skip

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

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read some rows of one tensor from disk; errors as of `read`."""
        if not self.is_plain(name):
            return self.read(name)[start:stop]
        return read_tensor(self.tensors[name].rows(start, stop), name)

    def weight(self, parameter: str) -> Weight:
        """A parameter in the form it is stored in, as a matrix (out, in); what is entropy-coded has its fixed width.

        Raises:
            CheckpointError: a compressed parameter is not what its description says, or a scale, factor or value of it
                is NaN or infinite.
        """
        entry = self.manifest.entries.get(parameter)
        if entry is None:
            return Dense(as_matrix(self.read(parameter)))
        kept = self.foreign.is_kept(parameter)
        try:
            weight = self.foreign.weight(parameter) if kept else fixed_width(self.restored(parameter, entry, self.read))
        except NONSENSE as error:
            raise CheckpointError(
                f"{self.path}: {parameter!r} cannot be decoded: {first_line(error)}",
                "download or write the checkpoint again",
            ) from error
        for suffix, tensor in weight.tensors().items():
            require_finite(tensor, f"{parameter}{suffix and '.'}{suffix}", self.path)
        return weight

    def no_data(self, name: str) -> Tensor:
        """A tensor of the file as its header shows it."""
        spec = self.tensors[name].spec
        return torch.empty(spec.shape, dtype=spec.dtype, device="meta")

    def restored(self, parameter: str, entry: Entry, read: Callable[[str], Tensor]) -> Weight:
        """A compressed parameter in its form, made of what `read` gives."""
        if self.layout == "compressed-tensors":
            return ct_restore(entry, parameter.removesuffix(".weight"), read, self.tensors)
        try:
            form = form_of(entry.meta["form"])
        except KeyError as error:
            raise Unsupported(
                f"{self.path}: {parameter!r} is stored in a form this version does not know ({entry.meta.get('form')})",
                "upgrade aicompress",
            ) from error
        return form.restore({s: read(name) for s, name in self.stored_names(parameter).items()}, entry.meta)

    def dense(self, parameter: str) -> Tensor:
        """A parameter as the dense tensor it stands for, in its own dtype and shape."""
        entries = self.manifest.entries
        return entries[parameter].decode(self.weight(parameter)) if parameter in entries else self.read(parameter)

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
