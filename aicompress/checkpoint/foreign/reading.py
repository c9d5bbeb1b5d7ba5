"""The weights of a checkpoint that are in foreign layouts: which tensors they take, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from aicompress.checkpoint.files import read_rows, read_tensor
from aicompress.checkpoint.foreign.layout import ForeignWeight, Read
from aicompress.checkpoint.header import TensorRef
from aicompress.checkpoint.manifest import Entry
from aicompress.checkpoint.source import Source
from aicompress.errors import CheckpointError, first_line
from aicompress.weights import TensorSpec, Weight

Decoded = TypeVar("Decoded")


@dataclass(frozen=True)
class ForeignWeights:
    """Parameters that another tool has quantized.

    Attributes:
        weights: by parameter. Those with an outline are kept in their form, the others are decoded as they are read.
        refs: where every tensor of them is, and the riders, by name on disk.
        riders: tensors that belong to rounded inputs and outputs; no step takes them along.
        cache_scales: tensors that belong to the key-value cache; steps take them along.
        rounds_inputs: the checkpoint says that layers round their inputs in a way that no form of ours holds.
        beside: files that were merged into the checkpoint, by what they are.
        merged: what was merged, in words.
        told: what is left out of it beside riders, in words.
        path: the checkpoint.
    """

    weights: Mapping[str, ForeignWeight] = field(default_factory=dict)
    refs: Mapping[str, TensorRef] = field(default_factory=dict)
    riders: tuple[str, ...] = ()
    cache_scales: tuple[str, ...] = ()
    rounds_inputs: bool = False
    beside: Mapping[str, Source] = field(default_factory=dict)
    merged: tuple[str, ...] = ()
    told: tuple[str, ...] = ()
    path: Path = Path()

    @property
    def decoded(self) -> list[str]:
        """Parameters that are decoded as they are read."""
        return [name for name, weight in self.weights.items() if weight.outline is None]

    @property
    def kept(self) -> list[str]:
        """Parameters that are kept in a form of ours."""
        return [name for name, weight in self.weights.items() if weight.outline is not None]

    def is_decoded(self, parameter: str) -> bool:
        """Whether a parameter is decoded as it is read."""
        return parameter in self.weights and self.weights[parameter].outline is None

    def is_kept(self, parameter: str) -> bool:
        """Whether a parameter is kept in a form of ours."""
        return parameter in self.weights and self.weights[parameter].outline is not None

    def entries(self) -> dict[str, Entry]:
        """Entries of the manifest for the weights that are kept."""
        return {
            name: Entry(weight.dense, weight.transposed, weight.outline.meta(), tuple(weight.outline.tensors()))
            for name, weight in self.weights.items()
            if weight.outline is not None
        }

    def specs(self, parameter: str) -> dict[str, TensorSpec]:
        """Dtypes and shapes of a parameter's tensors on disk, by name."""
        return {name: self.refs[name].spec for name in self.weights[parameter].names.values()}

    def shown(self, tensors: dict[str, TensorRef]) -> dict[str, TensorRef]:
        """Tensors as they are read: a decoded parameter in the place of what it is decoded from, and no riders.

        A decoded parameter begins nowhere, so that nothing reads it past `tensor`.
        """
        if not self.decoded and not self.riders:
            return tensors
        owner = {name: one for one in self.decoded for name in self.weights[one].names.values()}
        riders = set(self.riders)
        shown: dict[str, TensorRef] = {}
        for name, ref in tensors.items():
            if name in owner:
                shown.setdefault(owner[name], replace(ref, spec=self.weights[owner[name]].dense, begin=-1))
            elif name not in riders:
                shown[name] = ref
        for one in (one for one in self.decoded if one not in shown):  # a parameter that another file adds
            first = self.refs[next(iter(self.weights[one].extra.values()))]
            shown[one] = replace(first, spec=self.weights[one].dense, begin=-1)
        return shown

    def weight(self, parameter: str, rows: slice | None = None) -> Weight:
        """A parameter in a form of ours, or some rows of it.

        Raises:
            CheckpointError: its tensors are not what the layout says.
        """
        return self._read(parameter, lambda weight, read: weight.weight(read), rows)

    def tensor(self, parameter: str, rows: slice | None = None) -> Tensor:
        """The dense parameter, or some rows of it; errors as of `weight`."""
        return self._read(parameter, lambda weight, read: weight.tensor(read), rows)

    def _reader(self, weight: ForeignWeight, rows: slice | None) -> Read:
        """What reads the tensors of a weight by their names, or those parts of them that hold some rows."""
        if rows is None or weight.along is None:
            return lambda name: read_tensor(self.refs[name], name)
        named = {**weight.names, **weight.extra}
        along = {named[role]: axis for role, axis in weight.along.items()}
        return lambda name: read_rows(self.refs[name], name, along.get(name), rows, weight.rows)

    def _read(
        self, parameter: str, decode: Callable[[ForeignWeight, Read], Decoded], rows: slice | None = None
    ) -> Decoded:
        whole = self.weights[parameter]
        weight = whole if rows is None else whole.part(rows)
        try:
            return decode(weight, self._reader(whole, rows))
        except (LookupError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
            reason = first_line(error, "its tensors do not fit one another")
            raise CheckpointError(
                f"{self.path}: {parameter} ({weight.words}) cannot be decoded: {reason}",
                "download the checkpoint again",
            ) from error
