"""A checkpoint whose parameters are changed as they are read: a model rewritten without a second copy of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from aicompress.checkpoint.files import read_part
from aicompress.checkpoint.reader import Checkpoint
from aicompress.layer import as_matrix
from aicompress.weights import Dense, Weight

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RewrittenCheckpoint(Checkpoint):
    """The view of a checkpoint that a step reads instead of it; the files stay as they are.

    A parameter comes out in its own dtype, and as a layer for a method in float32: what is quantized next has not been
    rounded to the dtype of the file.

    Attributes:
        changes: by parameter what is done to it in turn, float32 in and out. Only plain parameters are changed.
        rescaled: the parameters whose changes multiply every element by a factor, and do nothing else.
        by_rows: the parameters whose changes do to each entry of the first axis what they do to it alone.
        edited: config.json where it differs from the file.
        source_of: the checkpoint that is viewed.
    """

    changes: dict[str, list[Change]] = field(default_factory=dict)
    rescaled: set[str] = field(default_factory=set)
    by_rows: set[str] = field(default_factory=set)
    edited: dict[str, Any] | None = None
    source_of: Checkpoint | None = None

    @classmethod
    def over(cls, checkpoint: Checkpoint) -> RewrittenCheckpoint:
        """A view of a checkpoint that changes nothing yet."""
        plain = {own.name: getattr(checkpoint, own.name) for own in fields(Checkpoint)}
        return cls(**plain, source_of=checkpoint.original)

    @property
    def original(self) -> Checkpoint:
        """The checkpoint as its files are."""
        return self if self.source_of is None else self.source_of

    @property
    def config(self) -> dict[str, Any] | None:
        """config.json, edited."""
        return self.source.config if self.edited is None else self.edited

    def untied(self, config: dict[str, Any], copies: Mapping[str, str]) -> RewrittenCheckpoint:
        """The view with parameters that are tied to others as parameters of their own, still with the others' numbers.

        Args:
            config: config.json that does not tie them.
            copies: copy -> original.
        """
        tensors = {**self.tensors, **{copy: self.tensors[kept] for copy, kept in copies.items()}}
        left = {copy: kept for copy, kept in self.copies.items() if copy not in copies}
        decoded = {copy: self.foreign.weights[kept] for copy, kept in copies.items() if self.foreign.is_decoded(kept)}
        foreign = replace(self.foreign, weights={**self.foreign.weights, **decoded})
        return replace(self, tensors=tensors, copies=left, edited=config, foreign=foreign)

    def change(self, parameter: str, change: Change, by_rows: bool = False) -> None:
        """Add a change.

        Args:
            parameter: what it changes.
            change: what is done.
            by_rows: entries of the first axis are changed each alone.

        Raises:
            ValueError: the parameter is stored compressed.
        """
        if parameter in self.manifest.entries:
            raise ValueError(f"{parameter} is compressed")
        if not by_rows:
            self.by_rows.discard(parameter)
        elif parameter not in self.changes and super().is_plain(parameter):
            self.by_rows.add(parameter)
        self.changes.setdefault(parameter, []).append(change)

    def rescale(self, parameter: str, change: Change) -> None:
        """Add a change that multiplies every element by a factor; errors as of `change`."""
        if parameter not in self.changes:
            self.rescaled.add(parameter)
        self.change(parameter, change)

    def factors(self, parameter: str) -> Tensor | None:
        """What every element of a rescaled parameter is multiplied by, in its shape; None for any other."""
        if parameter not in self.rescaled:
            return None
        factors = torch.ones(self.tensors[parameter].spec.shape)
        for change in self.changes[parameter]:
            factors = change(factors)
        return factors

    def exact(self, parameter: str) -> Tensor:
        """A parameter in float32, as no file holds it."""
        return self._changed(parameter, super().read(parameter))

    def _changed(self, parameter: str, tensor: Tensor) -> Tensor:
        tensor = tensor.float()
        for change in self.changes.get(parameter, ()):
            tensor = change(tensor)
        return tensor

    def read(self, name: str) -> Tensor:
        """A tensor in its own dtype, changed."""
        return self.exact(name).to(self.tensors[name].spec.dtype) if name in self.changes else super().read(name)

    def row_multiple(self, parameter: str, part: str = "") -> int:
        """As of the file; all of a parameter is read whose rows are not changed each alone."""
        return 0 if parameter in self.changes.keys() - self.by_rows else super().row_multiple(parameter, part)

    def rows(self, name: str, start: int, stop: int, axis: int = 0) -> Tensor:
        """As of the file; of a changed parameter in float32."""
        if name not in self.changes:
            return super().rows(name, start, stop, axis)
        if name not in self.by_rows or axis:
            return self.exact(name).narrow(axis, start, stop - start)
        return self._changed(name, read_part(self.tensors[name], name, slice(start, stop)))

    def is_plain(self, parameter: str) -> bool:
        """Whether a file holds a parameter as it is read."""
        return parameter not in self.changes and super().is_plain(parameter)

    def weight(self, parameter: str, rows: slice | None = None, part: str = "") -> Weight:
        """A parameter in the form it is stored in; a changed one in float32."""
        if parameter not in self.changes or rows is not None:
            return super().weight(parameter, rows, part)
        return Dense(as_matrix(self.exact(parameter)))
