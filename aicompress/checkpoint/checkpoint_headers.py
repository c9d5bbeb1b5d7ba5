"""What the headers of a checkpoint show: parameters, layers and stored forms, without a byte of data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aicompress.checkpoint import files
from aicompress.checkpoint.compressed_tensors.entries import CT_SUFFIXES, ct_restore
from aicompress.checkpoint.foreign.reading import ForeignWeights
from aicompress.checkpoint.header import TensorRef
from aicompress.checkpoint.layouts import native_names
from aicompress.checkpoint.manifest import Entry, Manifest
from aicompress.checkpoint.naming import is_transposed, kinds_among, layer_name
from aicompress.checkpoint.source import Source
from aicompress.errors import Unsupported
from aicompress.layer import Kind, LayerInfo
from aicompress.weights import Dense, TensorSpec, Weight, fixed_width, form_of
from aicompress.weights.coding.packing import WORD
from aicompress.weights.coding.rows import row_slices


@dataclass(frozen=True)
class CheckpointHeaders:
    """An open checkpoint as its headers and JSON files describe it.

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

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def config(self) -> dict[str, Any] | None:
        return self.source.config

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Dtype and shape of every tensor on disk."""
        return {name: ref.spec for name, ref in self.tensors.items()}

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

    def row_axis(self, parameter: str) -> int:
        """The axis that the rows of a matrix lie along: 1 of a parameter that is not plain and stores (in, out)."""
        known = self.foreign.weights.get(parameter) or self.manifest.entries.get(parameter)
        return 1 if known is not None and known.transposed else 0

    def rows_each(self, parameter: str) -> int:
        """Rows of a compressed parameter's matrix for each entry of its row axis: those of an expert, or one."""
        stored, length = self.stored_outline(parameter), self.parameters()[parameter].shape[self.row_axis(parameter)]
        return 1 if stored is None else stored.shape[0] // max(1, length)

    def row_multiple(self, parameter: str, part: str = "") -> int:
        """How many entries of a parameter's row axis lie together in the file: a block read alone begins at a multiple.

        Args:
            parameter: its name.
            part: of its weight, whose rows are meant then; '' for all of it.

        Returns:
            1 for a plain parameter; 0 where all of it has to be read to decode some.
        """
        if part:
            whole = self.outline(parameter)
            assert whole is not None
            return whole.parts()[part].row_multiple()
        if not self.parameters()[parameter].shape:
            return 0
        if parameter in self.foreign.weights:
            weight = self.foreign.weights[parameter]
            return 0 if weight.along is None else weight.multiple
        if parameter not in self.manifest.entries:
            return 1
        outline = self.outline(parameter)
        assert outline is not None
        multiple = WORD if self.layout == "compressed-tensors" else outline.row_multiple()
        return multiple // math.gcd(multiple, self.rows_each(parameter)) if multiple else 0

    def row_blocks(self, parameter: str, most: int, axis: int | None = None) -> list[slice | None]:
        """Blocks of about so many numbers along a parameter's row axis, in order; None for all of it at once.

        Args:
            parameter: its name.
            most: numbers of a block.
            axis: that the rows of a plain one lie along, where that is not the first.
        """
        multiple, shape = self.row_multiple(parameter), self.parameters()[parameter].shape
        if not multiple or math.prod(shape) <= most:
            return [None]
        axis = self.row_axis(parameter) if axis is None else axis
        inputs = math.prod(shape) // shape[axis]
        multiple = math.lcm(multiple, files.narrow(inputs, 2 * most)) if axis else multiple
        return [*row_slices(shape[axis], inputs, most, multiple)]

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
