"""All files of what a command names, whatever they are: packing takes everything along as it is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from aicompress.checkpoint.source import PACKING_REPORTS, Source, indexed, leads_outside, local_folder, locate
from aicompress.errors import CheckpointError


def everything(name: str | Path) -> Source:
    """The weight files of a directory and of the folders below it, and all other files.

    An index.json means its shards, and what lies beside them without being weights. Left are what is hidden, links to
    folders, and links that lead out of the directory.

    Raises:
        CheckpointError: it is not there, or holds no safetensors file.
    """
    path = local_folder(name)
    if path.is_dir():
        files = sorted(file for file in _visible(path) if file.suffix == ".safetensors")
        return _source(path, path, files)
    if path.is_file() and path.name.endswith(".index.json"):
        shards, _ = indexed(path)
        return _source(path, path.parent, list(shards))
    return locate(path)


def _source(path: Path, folder: Path, files: list[Path]) -> Source:
    """The source of a folder whose weights are known."""
    if not files:
        raise CheckpointError(f"{folder} holds no safetensors file", "give a folder or a file of safetensors weights")
    linked = [file for file in files if leads_outside(folder, file)]
    if linked:
        raise CheckpointError(
            f"{linked[0]} is a link to {linked[0].resolve()}, outside its folder",
            "copy the weights into the folder, or give the file itself as IN",
        )
    others = [file for file in _visible(folder) if file not in files and not _is_own_report(folder, file)]
    outside = [file for file in others if leads_outside(folder, file)]
    weights = [file for file in others if file.suffix == ".safetensors"]
    side = [file for file in others if file not in outside and file not in weights]
    left = _relative(folder, [*weights, *_passed_over(folder)])
    return Source(path, tuple(files), {}, folder, None, _relative(folder, side), left, _relative(folder, outside))


def _visible(folder: Path) -> list[Path]:
    """Files below a folder that are not hidden."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _passed_over(folder: Path) -> list[Path]:
    """Hidden files and folders, and links to folders, which are not looked into."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts[:-1])
        and (path.name.startswith(".") or (path.is_symlink() and not path.is_file()))
    ]


def _is_own_report(folder: Path, file: Path) -> bool:
    """Whether a file is the report of an earlier packing, which says nothing of the checkpoint."""
    return file.parent == folder and file.name in PACKING_REPORTS


def _relative(folder: Path, files: Iterable[Path]) -> tuple[Path, ...]:
    return tuple(file.relative_to(folder) for file in files)
