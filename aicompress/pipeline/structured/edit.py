"""What a structural step changes: tensors that go, are cut or renamed, and the config.json that describes the rest.

An edit follows from headers alone; `cutting` carries it out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aicompress.methods.structural import Structure


@dataclass(frozen=True)
class Cut:
    """A cut along one axis of a tensor: the entries of some units stay.

    Attributes:
        structure: the structure whose units lie there, by its place in the edit.
        axis: of the parameter's tensor.
        spans: the axis holds one section after another; a span is the number of entries of a unit in a section: (1, 1)
            for a fused gate and up projection, (head size,) for the heads of a query projection.
        begin: where the first section begins; what lies before and after the sections stays.
        stacked: the groups of the structure, such as the experts of a merged tensor, lie along axis 0.
    """

    structure: int
    axis: int
    spans: tuple[int, ...] = (1,)
    begin: int = 0
    stacked: bool = False


@dataclass(frozen=True)
class ParameterChange:
    """One parameter of the output.

    Attributes:
        source: the parameter of the input that it is made of.
        cuts: what is cut away from it.
        detail, note: what the report says of it; both are empty where nothing changes.
        refit: the entries that stay get new values from the method.
    """

    source: str
    cuts: tuple[Cut, ...] = ()
    detail: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    refit: bool = False


@dataclass(frozen=True)
class Edit:
    """A structural step before any tensor is read.

    Attributes:
        config: the output's config.json, or None for a bare file.
        structures: what the method chooses in.
        sizes: how many units of each stay.
        changes: every parameter of the output in the input's order.
        warnings: what the user should know.
        notes: what the user asked for, and the method has settled.
        calibration: the record of the calibration data that decided on the edit.
        kept: the units that stay, for structures where that is decided already.
        widths: layers whose shapes config.json does not give any more, by module; their tensors tell.
        files: side files of the output that are not as in the input.
        left_out: side files of the input that the output does not have.
        figures: what the report says of it, by name.
    """

    config: dict[str, Any] | None
    structures: tuple[Structure, ...]
    sizes: tuple[int, ...]
    changes: Mapping[str, ParameterChange]
    warnings: tuple[str, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())
    calibration: Mapping[str, Any] = field(default_factory=dict)
    kept: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    widths: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    files: Mapping[Path, bytes] = field(default_factory=dict)
    left_out: tuple[Path, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def changed(self) -> list[int]:
        """Structures of which some units go."""
        return [n for n, (s, size) in enumerate(zip(self.structures, self.sizes, strict=True)) if size < s.size]

    @property
    def consumers(self) -> list[str]:
        """Parameters that read the units of which some go."""
        changed = (self.structures[number] for number in self.changed)
        return list(dict.fromkeys(part.tensor for structure in changed for part in structure.of("consumer")))


def with_refits(
    changes: Mapping[str, ParameterChange], structures: Sequence[Structure], sizes: Sequence[int], refits: bool
) -> dict[str, ParameterChange]:
    """The changes, with those marked whose values the method gives: consumers of what is cut, and their biases."""
    marked = dict(changes)
    for structure, size in zip(structures, sizes, strict=True):
        for part in structure.parts if refits and size < structure.size else ():
            if part.role in ("consumer", "offset"):
                change = marked[part.tensor]
                detail = change.detail or {"refit": "takes up the mean of what goes"}
                marked[part.tensor] = replace(change, refit=True, detail=detail)
    return marked
