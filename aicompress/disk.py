"""Paths as users write them, and of reports; files that are complete or absent; clear lines where a disk takes none."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from aicompress.errors import CheckpointError, CompressError, OutOfSpace, Refused

LONGEST = 225  # bytes of a name: file systems take 255, of which what grows beside an output needs some


def expanded(path: str) -> Path:
    """A path whose `~` is the user's home, as a shell has it."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # there is no such user
        return Path(path)


def report_path(out: Path, name: str = "report.json") -> Path:
    """Where a file of the report of an output lies: inside a folder, beside a single file."""
    return out.with_name(f"{out.stem}.{name}") if out.suffix == ".safetensors" else out / name


def require_writable(out: Path) -> None:
    """Refuse, before any work, a place that cannot be written.

    Raises:
        Refused: no permission, or a part of the path is a file.
    """
    folder = out.resolve().parent
    if len(os.fsencode(out.name)) > LONGEST:
        raise Refused(f"{out.name} is a name of {len(os.fsencode(out.name))} bytes", f"take one of up to {LONGEST}")
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise Refused(f"{out} cannot be written: {folder} is not a directory", "choose another path")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise Refused(f"{out} cannot be written: {folder} is read-only", "check the path and permissions")


def require_file(path: Path) -> None:
    """Refuse, before any work, a place where no file can be written.

    Raises:
        Refused: it is a directory, or cannot be written.
    """
    if path.is_dir():
        raise Refused(f"{path} is a directory", "name a file")
    require_writable(path)


def write_whole(files: Mapping[Path, str]) -> None:
    """Write text files; none takes its place, or that of an earlier one, before all of them are on the disk.

    A device or a pipe is written to, and not replaced. Folders made for them stay only where something was written.

    Raises:
        OutOfSpace: the disk is full.
        CompressError: one cannot be written for another reason.
    """
    partials = {path: path.with_name(f".{path.name}.partial") for path in files if not _takes_bytes(path)}
    made = {parent for path in files for parent in path.parents if not parent.exists()}
    try:
        for path, text in files.items():
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                # A path in the text may hold bytes that are no UTF-8.
                partials.get(path, path).write_bytes(text.encode(errors="backslashreplace"))
        for path, partial in partials.items():
            with disk_errors(path):
                partial.replace(path)
    finally:
        for partial in partials.values():
            with contextlib.suppress(OSError):
                partial.unlink()
        for parent in sorted(made, key=lambda each: len(each.parts), reverse=True):  # one that holds anything stays
            with contextlib.suppress(OSError):
                parent.rmdir()


def _takes_bytes(path: Path) -> bool:
    """Whether a path is a device or a pipe, such as /dev/stdout, which no file may take the place of."""
    return path.exists() and not path.is_file() and not path.is_dir()


@contextlib.contextmanager
def readable(path: Path) -> Iterator[BinaryIO]:
    """A file of the input, open.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", "check its permissions") from error
    with file:
        yield file


def write_at(descriptor: int, view: memoryview, begin: int) -> None:
    """Write all bytes of a view at a place of a file."""
    while view:
        written = os.pwrite(descriptor, view, begin)
        view, begin = view[written:], begin + written


def empty(folder: Path) -> None:
    """Remove what is in a folder."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def fsync(path: Path) -> None:
    """Let the disk take what was written to a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(partial: Path, path: Path) -> None:
    """Give a file its name once its bytes are on the disk."""
    fsync(partial)
    os.replace(partial, path)


class disk_errors:
    """Turns a full disk and other errors of writing `out` into one clear line."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            error = _of_library(error)
        if not isinstance(error, OSError):
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfSpace(f"the disk of {self.out} is full", "free space, or write elsewhere") from error
        if error.errno == errno.EFBIG:
            hint = "raise the limit (ulimit -f), or split the output with --max-shard-size"
            raise OutOfSpace(f"{self.out} is larger than a file may be here", hint) from error
        what = error.filename if error.filename and not str(error.filename).startswith(str(self.out)) else self.out
        reason = error.strerror or error
        raise CompressError(f"{what} cannot be written: {reason}", "check the path and permissions") from error


def _of_library(error: BaseException) -> BaseException:
    """An error of the system that safetensors has put into words of its own; any other error as it is."""
    from safetensors import SafetensorError  # the help text needs none of it

    number = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    return error if number is None else OSError(int(number[1]), os.strerror(int(number[1])))
