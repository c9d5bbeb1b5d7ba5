"""A checkpoint written as a stream: header first, tensors in any order, renamed into place when complete.

Everything goes to a working directory beside the output. `seal` fsyncs it and renames it; any failure before that
removes it, so an output is a finished checkpoint or does not exist.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from aicompress.checkpoint.journal import NAME as JOURNAL
from aicompress.checkpoint.place import (
    identity,
    lock,
    make_parents,
    remove_parents,
    require_free,
    take_free_place,
    take_name_beside,
    take_place,
    working_path,
)
from aicompress.checkpoint.shards import ShardPlan, index_text, plan_shards
from aicompress.checkpoint.written import named, require_own_reports, strangers
from aicompress.disk import disk_errors, empty, fsync, readable, write_at
from aicompress.errors import CompressError, OutputExists, Refused
from aicompress.measure import nbytes
from aicompress.weights import TensorSpec
from aicompress.weights.coding.rows import share

REPLACED = ".replaced"  # how the names of weight files end that were begun anew


class CheckpointWriter:
    """Writes the files of a plan.

    Use it as a context manager: leaving it without `seal` removes what was written. Only an interrupt keeps it, so that
    a later run can resume. While it is open, no other process can write the same output.

    Args:
        out: a directory, or one file when the name ends in .safetensors. A link is followed.
        shards: from `plan_shards`; a single-file output takes exactly one.
        resume: keep what a stopped run left in the working directory, if it kept a journal.
        overwrite: what is at `out` when the run begins may be replaced; what comes there later never is.
        mode: permissions of the files, further reduced by the umask.
    """

    def __init__(
        self,
        out: Path,
        shards: tuple[ShardPlan, ...],
        resume: bool = False,
        overwrite: bool = True,
        mode: int = 0o666,
    ) -> None:
        self.out = out.resolve()
        self.single = out.suffix == ".safetensors"
        self.work = working_path(out)
        self.resume = resume and (self.work / JOURNAL).is_file()
        self._lay_out(shards)
        self._counting, self._open = threading.Lock(), dict[str, int]()
        self._lock: int | None = None
        self._extra, self._parents = list[Path](), list[Path]()
        self._sealed = False
        self._replaces = identity(self.out)
        self._overwrite = overwrite
        self.mode = mode

    def _lay_out(self, shards: tuple[ShardPlan, ...]) -> None:
        self.shards = shards
        self._shard_of = {name: shard for shard in shards for name in shard.specs}
        self._left = {name: spec.nbytes for shard in shards for name, spec in shard.specs.items()}

    def __enter__(self) -> Self:
        if self._replaces is not None and not self._overwrite:
            raise OutputExists(f"{self.out} exists", "choose another path, or give --overwrite")
        try:
            with disk_errors(self.out):
                make_parents(self.work, self._parents)
                self.work.mkdir(exist_ok=True)
                self._lock = lock(self.work)
                self._require_whole() if self.resume else empty(self.work)
                self._start()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def _require_whole(self) -> None:
        for shard in self.shards:
            path = self.work / shard.name
            if not path.is_file() or path.stat().st_size != shard.nbytes:
                raise Refused(f"{path} is not what the stopped run left", "run without --resume to start again")

    def _start(self) -> None:
        """Create the files at their full sizes, or open those of a stopped run, which have their headers already."""
        for shard in self.shards:
            descriptor = self._open[shard.name] = os.open(self.work / shard.name, os.O_RDWR | os.O_CREAT, self.mode)
            if not self.resume:
                write_at(descriptor, memoryview(shard.layout[0]), 0)
                os.truncate(descriptor, shard.nbytes)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; errors as of `put_rows`."""
        shard = self._shard_of[name]
        if TensorSpec.of(tensor) != shard.specs[name]:
            raise ValueError(f"{name}: planned {shard.specs[name]}, got {TensorSpec.of(tensor)}")
        self._write(name, tensor, [0])

    def put_rows(self, name: str, tensor: Tensor, start: int, total: int) -> None:
        """Write what rows of a weight gave; several threads may do so at once.

        Args:
            name: the tensor on disk.
            tensor: its part along the first axis, or all of it where its shape is the planned one.
            start, total: the weight's first row of these, and how many it has.

        Raises:
            ValueError: dtype or shape do not fit the plan.
            OutOfSpace: the disk is full.
        """
        self.put_part(name, tensor, share(self._shard_of[name].specs[name].shape[0], slice(start, total), total).start)

    def put_part(self, name: str, tensor: Tensor, first: int, axis: int = 0) -> None:
        """Write a part of a tensor along an axis, from an index on, or all of it; errors as of `put_rows`."""
        spec, own = self._shard_of[name].specs[name], TensorSpec.of(tensor)
        if own == spec:
            self._write(name, tensor, [0])
            return
        before, length, after = spec.shape[:axis], spec.shape[axis], spec.shape[axis + 1 :]
        count = own.shape[axis] if len(own.shape) > axis else 0
        if own != TensorSpec(spec.dtype, (*before, count, *after)) or first + count > length:
            raise ValueError(f"{name}: planned {spec}, got {own} from {first} on")
        entry = math.prod(after) * spec.dtype.itemsize
        self._write(name, tensor, [(piece * length + first) * entry for piece in range(math.prod(before))])

    def _write(self, name: str, tensor: Tensor, begins: Sequence[int]) -> None:
        """Write pieces of one length, by where each of them begins in a tensor."""
        shard = self._shard_of[name]
        if tensor.numel():
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            with disk_errors(self.out):
                for begin, piece in zip(begins, flat.reshape(len(begins), -1), strict=True):
                    write_at(self._open[shard.name], piece.data, shard.layout[1][name] + begin)
        whole = shard.specs[name].nbytes
        with self._counting:  # a whole tensor may be written twice
            self._left[name] = 0 if nbytes(tensor) == whole else self._left[name] - nbytes(tensor)

    def add(self, relative: str | Path, content: bytes | Path) -> None:
        """Put another file into a directory output: bytes, or a copy of a file."""
        target = self.work / relative
        with disk_errors(self.out):
            target.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, self.mode)
            with open(descriptor, "wb") as file:
                if isinstance(content, Path):
                    with readable(content) as original:
                        shutil.copyfileobj(original, file)
                else:
                    file.write(content)
        self._extra.append(target)

    def stamp(self, metadata: Mapping[str, str]) -> None:
        """Rewrite the first file's metadata, with facts that were not known before; it must not be longer.

        Raises:
            ValueError: it does not fit.
        """
        first = self.shards[0]
        header = first.stamped(metadata)
        with disk_errors(self.out):
            write_at(self._open[first.name], memoryview(header), 0)

    def restart(self, shards: tuple[ShardPlan, ...]) -> None:
        """Begin the weight files anew with other tensors; those so far end in `.replaced`, and nothing resumes them."""
        self._close()
        (self.work / JOURNAL).unlink(missing_ok=True)
        for shard in self.shards:
            os.replace(self.work / shard.name, self.work / f"{shard.name}{REPLACED}")
        self.resume = False
        self._lay_out(shards)
        self._start()

    def seal(self) -> None:
        """Finish: fsync, then rename into place.

        Raises:
            ValueError: a planned tensor was never written.
        """
        missing = [name for name, left in self._left.items() if left]
        if missing and not self.resume:
            raise ValueError(f"{len(missing)} planned tensors were not written, {min(missing)!r} among them")
        with disk_errors(self.out):
            for descriptor in self._open.values():
                os.fsync(descriptor)
            self._close()
            (self.work / JOURNAL).unlink(missing_ok=True)
            for path in [*self._extra, *{extra.parent for extra in self._extra}, self.work]:
                fsync(path)
            self._rename()
            fsync(self.out.parent)
        self._sealed = True

    def _finished(self) -> Path:
        """What takes the output's place."""
        return self.work / self.shards[0].name if self.single else self.work

    def names(self) -> tuple[str, ...]:
        """The files so far, below the output's directory."""
        shards = [shard.name for shard in self.shards]
        return (*shards, *(extra.relative_to(self.work).as_posix() for extra in self._extra))

    def _rename(self) -> None:
        """Files beside a single-file output first, the checkpoint last; a directory in one rename.

        Raises:
            CompressError: something has come to the output's place since the run began. It stays, and so does the
                finished output, beside it.
        """
        taken = f"{self.out} was made by somebody else while this ran, and is not replaced"
        if identity(self.out) != self._replaces:
            raise self._kept_beside(taken)
        finished = self._finished()
        if self.single:
            self._require_own_file()
            for extra in self._extra:
                os.replace(extra, self._beside(extra.name))
            if "report.html" not in {extra.name for extra in self._extra}:  # of the output that this one replaces
                self._beside("report.html").unlink(missing_ok=True)
        try:
            if self._replaces is None:
                take_free_place(finished, self.out)
            elif self.single:
                os.replace(finished, self.out)
            else:
                self._require_none(take_place(finished, self.out))
        except FileExistsError as error:
            raise self._kept_beside(taken) from error
        if self.single:
            shutil.rmtree(self.work)

    def _require_own_file(self) -> None:
        """Replace no file, and no report beside it, that has become somebody else's."""
        self._require_none(strangers(self.out) if self._replaces is not None else [])
        try:
            if self._extra:
                require_own_reports(self.out.parent, self._beside("").name)
        except OutputExists as error:
            raise self._kept_beside(error.message) from error

    def _require_none(self, others: list[str]) -> None:
        if others:
            raise self._kept_beside(f"aicompress did not write {named(others)} in {self.out}, which is not replaced")

    def _beside(self, name: str) -> Path:
        """A file that belongs to a single-file output."""
        return self.out.with_name(f"{self.out.name.removesuffix('.safetensors')}.{name}")

    def _kept_beside(self, message: str) -> CompressError:
        """Give the finished output a name of its own, and the error that tells it."""
        suffix = ".safetensors" if self.single else ""
        beside = take_name_beside(self._finished(), self.out, suffix)
        for extra in self._extra if self.single else ():
            with contextlib.suppress(FileExistsError):
                take_free_place(extra, beside.with_name(f"{beside.name.removesuffix(suffix)}.{extra.name}"))
        self._sealed = True
        if self.work.exists():
            shutil.rmtree(self.work)
        return CompressError(message, f"the finished output is {beside}: move it where you want it")

    def _close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if self._lock is None:  # nothing here is ours
            remove_parents(self._parents)
            return
        if not self._sealed and not isinstance(error, KeyboardInterrupt):
            shutil.rmtree(self.work, ignore_errors=True)  # the error on its way out matters more
            remove_parents(self._parents)
        os.close(self._lock)


__all__ = ["CheckpointWriter", "ShardPlan", "index_text", "plan_shards", "require_free", "working_path"]
