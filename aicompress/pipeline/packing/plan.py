"""The plan of a packing: the files that are coded, the files that are copied, the place of the output, the base that
it is the difference to.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from aicompress.checkpoint.files import digests
from aicompress.checkpoint.header import PACKED_SUFFIX, packed_error
from aicompress.checkpoint.packed.folder import everything
from aicompress.checkpoint.packed.raw_header import Extent, RawHeader, read_raw_header
from aicompress.checkpoint.packed.reader import is_packed
from aicompress.checkpoint.source import Source
from aicompress.disk import require_writable
from aicompress.errors import CheckpointError, Refused, raise_all
from aicompress.pipeline.step.checks import taken
from aicompress.pipeline.step.output import Destination
from aicompress.recipe.made import PackingRecipe
from aicompress.report.plan import PlanRow, PlanSummary


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie."""

    file: Path
    extent: Extent


@dataclass(frozen=True)
class Base:
    """The weight files of a base.

    Attributes:
        source: its files.
        headers: by file name.
    """

    source: Source
    headers: Mapping[str, RawHeader]

    @classmethod
    def open(cls, name: str | Path) -> Base:
        """Open a base: headers only.

        Raises:
            CheckpointError: missing, damaged, or packed itself.
        """
        source = everything(name)
        packed = [file for file in source.files if is_packed(file)]
        if packed:
            raise packed_error(packed[0])
        return cls(source, {source.name_of(file): read_raw_header(file) for file in source.files})

    @cached_property
    def _by_tensor(self) -> dict[str, list[str]]:
        """Names of the files that hold a tensor of each name."""
        holders: dict[str, list[str]] = {}
        for file, header in self.headers.items():
            for tensor in header.extents:
                holders.setdefault(tensor, []).append(file)
        return holders

    def reference(self, file: str, tensor: str, extent: Extent) -> Place | None:
        """The tensor of the same name, dtype and shape, in the file of the same name or in the only one with it."""
        holders = self._by_tensor.get(tensor, [])
        holder = file if file in holders else holders[0] if len(holders) == 1 else None
        if holder is None:
            return None
        other = self.headers[holder].extents[tensor]
        if (other.dtype, other.shape, other.nbytes) != (extent.dtype, extent.shape, extent.nbytes):
            return None
        path = next(path for path in self.source.files if self.source.name_of(path) == holder)
        return Place(path, other)

    def with_digests(self, noted: Collection[str]) -> Base:
        """The files of it whose digests were noted when something was stored as the difference to them.

        Raises:
            CheckpointError: one of them has changed, or is not there.
        """
        actual = digests(self.source)
        if not set(noted) <= set(actual.values()):
            raise CheckpointError(
                f"{self.source.path} is not the base that this was packed with: the sha256 of its weights differs",
                "give the same files that `aicompress pack --base` was given",
            )
        return Base(self.source, {name: header for name, header in self.headers.items() if actual[name] in noted})


SUFFIX = ".safetensors"


@dataclass(frozen=True)
class PackingPlan:
    """A packing, or an unpacking, that can be run or printed.

    Attributes:
        source: every file of the input.
        destination: where the output goes.
        recipe: what to do.
        base: what is stored as the difference to it.
        names: the output's name of each weight file of the input.
        nbytes: exact bytes of each of these; empty until they are known.
        rows: the layers, as far as they have been coded.
        warnings: what the user should know.
        notes: what was settled.
    """

    source: Source
    destination: Destination
    recipe: PackingRecipe
    base: Base | None
    names: dict[Path, str]
    nbytes: dict[str, int]
    rows: tuple[PlanRow, ...] = ()
    unchanged: int = 0
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def side_bytes(self) -> int:
        """Bytes of the files that are copied."""
        folder = self.source.folder
        return sum((folder / name).stat().st_size for name in self.source.side_files) if folder is not None else 0

    def summary(self) -> PlanSummary:
        """What a dry run prints."""
        return PlanSummary(
            command=self.recipe.method.name,
            source=str(self.source.path),
            out=str(self.destination.path),
            method=self.recipe.method.model_dump(mode="json"),
            rows=self.rows,
            unchanged=self.unchanged,
            weight_files=self.nbytes,
            other_bytes=self.side_bytes,
            bytes_before=sum(file.stat().st_size for file in self.source.files),
            warnings=self.warnings,
            layout=self.recipe.method.layout,
            notes=self.notes,
        )


def require_place(source: Source, base: Base | None, destination: Destination) -> None:
    """Refuse a place of the output that is taken, or that would change an input.

    Raises:
        Refused: or Problems, everything that is wrong with it.
    """
    out = destination.path
    problems = taken([source, *([] if base is None else [base.source])], destination)
    if destination.single and source.folder is not None:
        hint = "name a directory, or give one file as IN"
        problems.append(Refused(f"{out} is one file, and {source.path} holds others beside its weights", hint))
    raise_all(problems)
    require_writable(out)


def packed_name(name: str) -> str:
    """The name of a packed file in a directory: one that no reader of weights looks for."""
    return f"{name.removesuffix(SUFFIX)}{PACKED_SUFFIX}"


def unpacked_name(name: str) -> str:
    """The name of the file that a packed one holds."""
    return f"{name.removesuffix(PACKED_SUFFIX)}{SUFFIX}" if name.endswith(PACKED_SUFFIX) else name
