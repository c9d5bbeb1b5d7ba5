"""Check packed files: every chunk is decoded, and the digest of what they hold compared; nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from aicompress.checkpoint.packed.folder import everything
from aicompress.checkpoint.packed.reader import OpenedPackedFile, is_packed
from aicompress.checkpoint.source import locate
from aicompress.errors import CheckpointError
from aicompress.pipeline.packing.coding import unpack_file
from aicompress.pipeline.step.options import Progress


@dataclass(frozen=True)
class CheckedFiles:
    """What was checked, and what is wrong.

    Attributes:
        files: how many were unpacked, their digests compared.
        tensors: how many these hold.
        problems: one line each; empty when all is well.
        notes: what could not be checked, and why.
    """

    files: int
    tensors: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def packed_files(source: str | Path) -> tuple[Path, ...]:
    """All weight files of a checkpoint that is packed, or of several in one folder; none of one that is not."""
    with suppress(CheckpointError):  # shards that the index has other names for, or several checkpoints
        if not all(map(_is_packed, locate(source).files)):
            return ()
    with suppress(CheckpointError):
        return tuple(file for file in everything(source).files if _is_packed(file))
    return ()


def _is_packed(file: Path) -> bool:
    try:
        return is_packed(file)
    except CheckpointError:
        return False


def check_packed(files: Sequence[Path], progress: Progress) -> CheckedFiles:
    """Unpack files to nowhere."""
    problems: list[str] = []
    notes: list[str] = []
    checked = tensors = 0
    for number, file in enumerate(files):
        try:
            packed = OpenedPackedFile.open(file)
            if packed.manifest.base:
                notes.append(f"{file.name} is the difference to a base: it can only be checked by unpacking it")
            else:
                unpack_file(packed, file.name, None, (None, file.name), lambda tensor, size: None)
                checked, tensors = checked + 1, tensors + len(packed.header.extents)
        except CheckpointError as error:
            problems.append(error.message)
        progress(file.name, number + 1, len(files))
    return CheckedFiles(checked, tensors, tuple(problems), tuple(notes))
