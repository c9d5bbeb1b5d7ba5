"""Check where an output may go, and rename a finished one into place."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType

from aicompress.checkpoint.source import Source
from aicompress.checkpoint.written import require_own, require_own_reports, strangers
from aicompress.errors import CompressError, OutOfSpace, OutputExists, Refused

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2


def working_path(out: Path) -> Path:
    """Where an output grows until it is complete: beside it, so that a rename can finish it. Links are followed."""
    place = out.resolve()
    return place.parent / f".{place.name}.aicompress-partial"


def require_free(out: Path, overwrite: bool) -> None:
    """Refuse an output path that is taken.

    Raises:
        OutputExists: it exists and `overwrite` is off, or something is there that no run of this tool wrote.
    """
    single = out.suffix == ".safetensors"
    if single:
        require_own_reports(out.parent, f"{out.name.removesuffix('.safetensors')}.")
    if not out.exists():
        return
    if not overwrite:
        raise OutputExists(f"{out} exists", "choose another path, or give --overwrite")
    if single == out.is_dir():
        kind = "one file" if single else "a directory"
        raise OutputExists(f"{out} is {'a directory' if single else 'a file'}", f"OUT is {kind}: choose another path")
    if not single and Path.cwd().is_relative_to(out.resolve()):
        raise OutputExists(f"{out} holds the working directory", "it is not replaced: choose another path")
    require_own(out)


def require_apart(source: Source, out: Path) -> None:
    """Refuse an output that would change its input, also through links.

    Raises:
        Refused: OUT is IN, holds it, or lies inside it.
    """
    place = out.resolve()
    folder = source.folder.resolve() if source.folder is not None else None
    inputs = {source.path.resolve()}
    for file in source.files:
        inputs |= {file.resolve(), file.parent.resolve() / file.name}
    hint = "the input is never changed: choose another OUT"
    if place in inputs or place == folder:
        raise Refused(f"{out} is the input itself", hint)
    if folder is not None and place.is_relative_to(folder):
        raise Refused(f"{out} lies inside the input {source.path}", hint)
    if any(file.is_relative_to(place) for file in inputs):
        raise Refused(f"{out} holds the input {source.path}", hint)


def require_writable(out: Path) -> None:
    """Refuse, before any work, a place that cannot be written.

    Raises:
        Refused: no permission, or a part of the path is a file.
    """
    folder = out.resolve().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise Refused(f"{out} cannot be written: {folder} is not a directory", "choose another path")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise Refused(f"{out} cannot be written: {folder} is read-only", "check the path and permissions")


def lock(work: Path) -> int:
    """Hold a working directory until the descriptor is closed.

    Raises:
        Refused: another process holds it.
    """
    descriptor = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise Refused(f"{work} is in use by another run", "wait for it, or choose another OUT") from error
    except OSError as error:
        # Some network file systems have no locks: two runs into one OUT are the user's to avoid there.
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
            os.close(descriptor)
            raise
    return descriptor


def take_place(new: Path, out: Path) -> list[str]:
    """Rename a finished directory to `out`; what is there now is swapped out in the same step, then deleted.

    Returns:
        What no run of this tool wrote of what is there; where there is any, nothing has changed.
    """
    if not out.exists():
        os.rename(new, out)
        return []
    swapped = _exchange(new, out)
    old = new if swapped else new.with_name(f"{new.name}-replaced")
    if not swapped:
        os.rename(out, old)
        try:
            os.rename(new, out)
        except BaseException:
            os.rename(old, out)
            raise
    others = strangers(old)  # only now nothing more can come to it
    if not others:
        shutil.rmtree(old)
    elif not (swapped and _exchange(new, out)):
        os.rename(out, new)
        os.rename(old, out)
    return others


def take_free_place(new: Path, out: Path) -> None:
    """Rename a finished file or directory to `out`, where nothing may be.

    Raises:
        FileExistsError: something is there; nothing has changed.
    """
    done = _renameat2(new, out, _RENAME_NOREPLACE)
    if done is not None:
        if done in (errno.EEXIST, errno.ENOTEMPTY):
            raise FileExistsError(done, os.strerror(done), str(out))
        if done == 0:
            return
    if new.is_dir():  # the file system cannot: an empty directory holds the name, and a rename may replace that
        out.mkdir()
        os.rename(new, out)
    else:
        os.link(new, out)
        new.unlink()


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names at once, where the system can (Linux's renameat2)."""
    return _renameat2(one, other, _RENAME_EXCHANGE) == 0


def _renameat2(old: Path, new: Path, flags: int) -> int | None:
    """The error number of Linux's renameat2, 0 for none; None on systems without it."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return None
    ctypes.set_errno(0)
    failed = rename(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags) != 0
    return ctypes.get_errno() if failed else 0


def identity(path: Path) -> tuple[int, int] | None:
    """What tells a file or directory from another one of the same name; None where nothing is."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def empty(folder: Path) -> None:
    """Remove what a stopped run left in its working directory."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def fsync(path: Path) -> None:
    """Have a file, or the names in a directory, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class disk_errors:
    """Turns a full disk and other errors of writing `out` into one clear line."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
