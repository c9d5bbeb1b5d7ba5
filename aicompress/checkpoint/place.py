"""Check where an output may go, and rename a finished one into place."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import itertools
import operator
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from aicompress.checkpoint.source import OTHER_FILES, Source
from aicompress.checkpoint.written import require_own, require_own_reports, strangers
from aicompress.errors import OutputExists, Refused

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
        Refused: it is called as a file of another format is.
    """
    single = out.suffix == ".safetensors"
    if out.suffix.lower() in OTHER_FILES and not out.is_dir():
        raise Refused(f"{out} is no name of an output", "OUT is a directory, or one file that ends in .safetensors")
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


def shared_mode(files: Iterable[Path]) -> int:
    """Permissions of an output's files: nobody may read it who may not read an input."""
    return functools.reduce(operator.and_, (file.stat().st_mode for file in files), 0o666) | 0o600


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


def make_parents(path: Path, made: list[Path]) -> None:
    """Make the folders above a path that are missing, and add each to `made`, so that a failure can remove them."""
    for parent in reversed([parent for parent in path.parents if not parent.exists()]):
        parent.mkdir()
        made.append(parent)


def remove_parents(made: list[Path]) -> None:
    """Remove folders that `make_parents` made and nothing lies in."""
    for parent in reversed(made):
        if not any(parent.iterdir()):
            parent.rmdir()


def take_name_beside(finished: Path, out: Path, suffix: str) -> Path:
    """Rename a finished output to the first free name beside its place: `w4-1` for `w4`; returns its path."""
    for number in itertools.count(1):
        beside = out.with_name(f"{out.name.removesuffix(suffix)}-{number}{suffix}")
        with contextlib.suppress(FileExistsError):
            take_free_place(finished, beside)
            return beside
    raise AssertionError("unreachable")
