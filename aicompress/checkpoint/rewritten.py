"""A checkpoint whose parameters are changed as they are read: a model rewritten without a second copy of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields

from torch import Tensor

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
    """

    changes: dict[str, list[Change]] = field(default_factory=dict)

    @classmethod
    def over(cls, checkpoint: Checkpoint) -> RewrittenCheckpoint:
        """A view of a checkpoint that changes nothing yet."""
        return cls(**{own.name: getattr(checkpoint, own.name) for own in fields(Checkpoint)})

    def change(self, parameter: str, change: Change) -> None:
        """Add a change.

        Raises:
            ValueError: the parameter is stored compressed.
        """
        if parameter in self.manifest.entries:
            raise ValueError(f"{parameter} is compressed")
        self.changes.setdefault(parameter, []).append(change)

    def exact(self, parameter: str) -> Tensor:
        """A parameter in float32, as no file holds it."""
        found = super().read(parameter).float()
        for change in self.changes.get(parameter, ()):
            found = change(found)
        return found

    def read(self, name: str) -> Tensor:
        """A tensor in its own dtype, changed."""
        return self.exact(name).to(self.tensors[name].spec.dtype) if name in self.changes else super().read(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one tensor, changed."""
        return self.read(name)[start:stop] if name in self.changes else super().rows(name, start, stop)

    def is_plain(self, parameter: str) -> bool:
        """Whether a file holds a parameter as it is read."""
        return parameter not in self.changes and super().is_plain(parameter)

    def weight(self, parameter: str) -> Weight:
        """A parameter in the form it is stored in; a changed one in float32."""
        if parameter not in self.changes:
            return super().weight(parameter)
        return Dense(as_matrix(self.exact(parameter)))
