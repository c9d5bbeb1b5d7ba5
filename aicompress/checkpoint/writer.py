"""A checkpoint written as a stream: header first, tensors in any order, renamed into place when complete.

Everything goes to a working directory beside the output. `seal` fsyncs it and renames it; any failure before that
removes it, so an output is a finished checkpoint or does not exist.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from aicompress.checkpoint.header import build_header
from aicompress.checkpoint.journal import NAME as JOURNAL
from aicompress.errors import CompressError, OutOfSpace, OutputExists
from aicompress.weights import TensorSpec


@dataclass(frozen=True)
class ShardPlan:
    """One output file, known to the byte before any data is.

    Attributes:
        name: file name.
        specs: its tensors.
        metadata: strings of its header.
    """

    name: str
    specs: dict[str, TensorSpec]
    metadata: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Exact size of the file."""
        header, _ = build_header(self.specs, self.metadata)
        return len(header) + sum(spec.nbytes for spec in self.specs.values())


def plan_shards(
    specs: Mapping[str, TensorSpec], limit: int | None, metadata: Mapping[str, str]
) -> tuple[ShardPlan, ...]:
    """Split tensors into files of at most `limit` bytes of data; one tensor is never split, one layer hardly ever.

    Args:
        specs: tensors in the order they should lie.
        limit: bytes, or None for one file.
        metadata: strings for the header of the first file.
    """
    modules: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in specs.items():
        modules.setdefault(name.rpartition(".")[0], {})[name] = spec
    shards: list[dict[str, TensorSpec]] = [{}]
    used = 0
    for tensors in modules.values():
        size = sum(spec.nbytes for spec in tensors.values())
        if limit is not None and used and used + size > limit:
            shards.append({})
            used = 0
        shards[-1].update(tensors)
        used += size
    count = len(shards)
    names = (
        ["model.safetensors"]
        if count == 1
        else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    )
    return tuple(
        ShardPlan(n, s, dict(metadata) if i == 0 else {}) for i, (n, s) in enumerate(zip(names, shards, strict=True))
    )


def index_text(shards: tuple[ShardPlan, ...], parameters: int) -> str:
    """The index of a sharded checkpoint; total_size is in bytes."""
    total = sum(spec.nbytes for shard in shards for spec in shard.specs.values())
    weight_map = {name: shard.name for shard in shards for name in shard.specs}
    return json.dumps(
        {
            "metadata": {"total_size": total, "total_parameters": parameters},
            "weight_map": dict(sorted(weight_map.items())),
        },
        indent=2,
    )


def working_path(out: Path) -> Path:
    """Where an output grows until it is complete."""
    return out.parent / f".{out.name}.aicompress-partial"


def require_free(out: Path, overwrite: bool) -> None:
    """Refuse an output path that is taken or cannot be written.

    Raises:
        OutputExists: it exists and `overwrite` is off.
    """
    if out.exists() and not overwrite:
        raise OutputExists(f"{out} exists", "choose another path, or give --overwrite")
    if (
        out.is_dir()
        and not (out / "config.json").exists()
        and not any(out.glob("*.safetensors"))
        and any(out.iterdir())
    ):
        raise OutputExists(f"{out} exists and is not a checkpoint", "it will not be overwritten: choose another path")


class CheckpointWriter:
    """Writes the files of a plan.

    Use it as a context manager: leaving it without `seal` removes what was written. Only an interrupt keeps it, so that
    a later run can resume.

    Args:
        out: a directory, or one file when the name ends in .safetensors.
        shards: from `plan_shards`; a single-file output takes exactly one.
        resume: keep what a stopped run left in the working directory.
    """

    def __init__(self, out: Path, shards: tuple[ShardPlan, ...], resume: bool = False) -> None:
        self.out = out
        self.single = out.suffix == ".safetensors"
        self.shards = shards
        self.resume = resume
        self.work = working_path(out)
        self._where = {name: (shard, begin) for shard in shards for name, begin in _offsets(shard).items()}
        self._open: dict[str, int] = {}
        self._extra: list[Path] = []
        self._sealed = False

    def __enter__(self) -> Self:
        if self.work.exists() and not self.resume:
            shutil.rmtree(self.work)
        with _disk_errors(self.out):
            self.work.mkdir(parents=True, exist_ok=True)
            for shard in self.shards:
                path = self.work / shard.name
                fresh = not path.exists()
                self._open[shard.name] = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
                if fresh:
                    header, _ = build_header(shard.specs, shard.metadata)
                    os.pwrite(self._open[shard.name], header, 0)
                    os.truncate(path, shard.nbytes)
        return self

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor.

        Raises:
            ValueError: dtype or shape differ from the plan.
            OutOfSpace: the disk is full.
        """
        shard, begin = self._where[name]
        if TensorSpec.of(tensor) != shard.specs[name]:
            raise ValueError(f"{name}: planned {shard.specs[name]}, got {TensorSpec.of(tensor)}")
        if not tensor.numel():
            return
        flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        with _disk_errors(self.out):
            view = flat.data
            while view:
                written = os.pwrite(self._open[shard.name], view, begin)
                view, begin = view[written:], begin + written

    def add(self, relative: str | Path, content: bytes | Path) -> None:
        """Put another file into a directory output: bytes, or a copy of a file."""
        target = self.work / relative
        with _disk_errors(self.out):
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, target)
            else:
                target.write_bytes(content)
        self._extra.append(target)

    def seal(self, metadata: Mapping[str, str] | None = None) -> None:
        """Finish: rewrite the first header's metadata if given (it must not be longer), fsync, rename into place."""
        with _disk_errors(self.out):
            if metadata is not None:
                self._rewrite_metadata(metadata)
            for descriptor in self._open.values():
                os.fsync(descriptor)
            self._close()
            (self.work / JOURNAL).unlink(missing_ok=True)
            for extra in self._extra:
                _fsync(extra)
            _fsync(self.work)
            self._rename()
            _fsync(self.out.parent)
        self._sealed = True

    def _rewrite_metadata(self, metadata: Mapping[str, str]) -> None:
        first = self.shards[0]
        planned, _ = build_header(first.specs, first.metadata)
        header, _ = build_header(first.specs, metadata, length=len(planned) - 8)
        os.pwrite(self._open[first.name], header, 0)

    def _rename(self) -> None:
        """Files beside a single-file output first, the checkpoint last; a directory in one rename."""
        if self.single:
            stem = self.out.name.removesuffix(".safetensors")
            for extra in self._extra:
                os.replace(extra, self.out.parent / f"{stem}.{extra.name}")
            os.replace(self.work / self.shards[0].name, self.out)
            shutil.rmtree(self.work)
            return
        old = self.out.parent / f".{self.out.name}.aicompress-old"
        if self.out.exists():
            os.replace(self.out, old)
        os.replace(self.work, self.out)
        if old.exists():
            shutil.rmtree(old)

    def _close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if not self._sealed and not isinstance(error, KeyboardInterrupt):
            shutil.rmtree(self.work, ignore_errors=True)


def _offsets(shard: ShardPlan) -> dict[str, int]:
    return build_header(shard.specs, shard.metadata)[1]


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _disk_errors:
    """Turns a full disk and other write errors into one clear line."""

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
            raise OutOfSpace(f"the disk of {self.out.parent} is full", "free space, or write elsewhere") from error
        raise CompressError(
            f"{self.out} cannot be written: {error.strerror or error}", "check the path and permissions"
        ) from error
