"""The checkpoint that another one is stored as the difference to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from aicompress.checkpoint.files import digests
from aicompress.checkpoint.header import packed_error
from aicompress.checkpoint.packed.folder import everything
from aicompress.checkpoint.packed.raw_header import Extent, RawHeader, read_raw_header
from aicompress.checkpoint.packed.reader import is_packed
from aicompress.checkpoint.source import Source
from aicompress.errors import CheckpointError


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
