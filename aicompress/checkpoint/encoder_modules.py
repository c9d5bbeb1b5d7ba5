"""The modules that sentence-transformers makes an encoder of, each in a folder of its own, or in the encoder's."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from aicompress.checkpoint.json_text import parsed
from aicompress.errors import CheckpointError

MODULES = "modules.json"


def module_folders(folder: Path) -> set[str]:
    """First parts of the folders that modules.json names; of the folder itself, written "" or ".", there is none."""
    return {part for _, path in encoder_modules(folder) for part in path.parts[:1]}


def encoder_modules(folder: Path) -> list[tuple[str, PurePosixPath]]:
    """Classes of sentence-transformers and their folders, as modules.json lists them; none where there is no such file.

    Raises:
        CheckpointError: it is no list of modules.
    """
    listed = folder / MODULES
    if not listed.is_file():
        return []
    try:
        modules = parsed(listed.read_bytes())
        return [(str(each["type"]).rpartition(".")[2], PurePosixPath(each["path"])) for each in modules]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{listed} is not a list of modules", "download or copy the checkpoint again") from error


def encoder_folder(folder: Path) -> Path | None:
    """The sentence-transformers folder that has this one as its transformer: itself, the one above, or none."""
    if (folder / MODULES).is_file():
        return folder
    above = folder.absolute().parent
    try:
        return above if folder.name in module_folders(above) else None
    except CheckpointError:
        return None  # a file of that name that says something else
