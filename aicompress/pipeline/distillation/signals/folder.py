"""A folder of a teacher's outputs for every sample: safetensors shards, and a manifest that says what they are of.

`signals-00001.safetensors` and so on hold the samples in their order: the tensors of a stored form of the logits, one
row a position, `positions` (samples,) how many of these each sample has, and `embedding` (samples, width) where that is
stored. The folder grows beside its place and is renamed last: it is complete or absent. What a killed run has left is
continued where it is of the same teacher and samples, and made anew where it is not.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aicompress.checkpoint.json_text import parsed
from aicompress.checkpoint.place import lock, working_path
from aicompress.disk import disk_errors, empty, fsync, put_in_place
from aicompress.errors import CheckpointError, Refused
from aicompress.pipeline.step.workers import Processes

MANIFEST = "manifest.json"
MARK, VERSION = "aicompress_teacher_signals", 1
Told = Mapping[str, Any]  # JSON-ready


@dataclass(frozen=True)
class SignalFolder:
    """A complete folder of stored outputs.

    Attributes:
        path: the folder.
        told: what they are of, as `write` was given it.
        shards: name, first sample, samples and bytes of each.
    """

    path: Path
    told: Told
    shards: tuple[tuple[str, int, int, int], ...]

    @classmethod
    def open(cls, path: Path) -> SignalFolder:
        """Read the manifest, and see that every shard is there whole.

        Raises:
            Refused: the folder is something else.
            CheckpointError: it is damaged, or of another version.
        """
        manifest = path / MANIFEST
        if not manifest.is_file():
            raise Refused(
                f"{path} holds no outputs of a teacher", "give --cache-teacher a folder that is not there yet"
            )
        try:
            plain = parsed(manifest.read_bytes())
            version, told = plain[MARK], dict(plain["told"])
            shards = tuple(
                (str(s["file"]), int(s["first"]), int(s["samples"]), int(s["bytes"])) for s in plain["shards"]
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{manifest} is damaged", AGAIN) from error
        if version != VERSION:
            raise CheckpointError(f"{path}: stored outputs of version {version} are not known", "update aicompress")
        for name, _, _, size in shards:
            file = path / name
            if not file.is_file() or file.stat().st_size != size:
                raise CheckpointError(f"{file} is {'cut short' if file.is_file() else 'missing'}", AGAIN)
        return cls(path, told, shards)

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(size for *_, size in self.shards)

    @cached_property
    def _tensors(self) -> list[dict[str, Tensor]]:
        """Every shard, mapped into memory and not read, with where each sample's positions begin."""
        opened = [load_file(self.path / name) for name, *_ in self.shards]
        for shard in opened:
            ends = shard.pop("positions").long().cumsum(0)
            shard["begin"] = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
        return opened

    def rows(self, index: Tensor) -> dict[str, Tensor]:
        """The stored tensors of some samples: of the logits one row a position, of the embedding one a sample."""
        firsts = [first for _, first, _, _ in self.shards]
        parts: dict[str, list[Tensor]] = {}
        for sample in index.tolist():
            number = bisect_right(firsts, sample) - 1
            shard, place = self._tensors[number], sample - firsts[number]
            begin, end = shard["begin"][place : place + 2].tolist()
            for name, tensor in shard.items():
                if name != "begin":
                    rows = tensor[place : place + 1] if name == "embedding" else tensor[begin:end]
                    parts.setdefault(name, []).append(rows)
        return {name: torch.cat(rows) for name, rows in parts.items()}


AGAIN = "delete the folder: the next run makes it anew"


def write(
    path: Path, told: Told, ranges: list[tuple[int, int]], shard: Callable[[int, int], dict[str, Tensor]],
    team: Processes,
) -> SignalFolder:  # fmt: skip
    """Store the outputs for ranges of samples, each a shard; every process makes its share of them.

    Args:
        path: where the folder goes; nothing, or an empty folder, is there.
        told: what they are of; what a stopped run has left is continued where it says the same.
        ranges: first sample and the one behind the last.
        shard: makes a shard's tensors.
        team: the processes that run.

    Raises:
        Refused: another run makes the same folder.
        OutOfSpace: the disk is full; what is whole is kept for the next run.
    """
    work = working_path(path)
    with disk_errors(path):
        held = _begun(work, told) if team.rank == 0 else None
        team.wait()
        try:
            for number, (first, end) in list(enumerate(ranges, start=1))[team.rank :: team.size]:
                file = work / f"signals-{number:05d}.safetensors"
                if not file.exists():
                    partial = file.with_suffix(".partial")
                    save_file(shard(first, end), partial)
                    put_in_place(partial, file)
            team.wait()
            if team.rank == 0:
                _seal(work, path, told, ranges)
            team.wait()
        finally:
            if held is not None:
                os.close(held)
    return SignalFolder.open(path)


def _begun(work: Path, told: Told) -> int:
    """A working folder that holds whole shards of the same outputs alone, locked."""
    work.mkdir(parents=True, exist_ok=True)
    held = lock(work)
    begun = work / "begun.json"
    text = json.dumps(told, sort_keys=True)
    if not begun.is_file() or begun.read_text(encoding="utf-8") != text:
        empty(work)
        partial = begun.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, begun)
    return held


def _seal(work: Path, path: Path, told: Told, ranges: list[tuple[int, int]]) -> None:
    shards = [
        {"file": file.name, "first": first, "samples": end - first, "bytes": file.stat().st_size}
        for number, (first, end) in enumerate(ranges, start=1)
        for file in [work / f"signals-{number:05d}.safetensors"]
    ]
    plain = {MARK: VERSION, "told": told, "shards": shards}
    (work / MANIFEST).write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    fsync(work / MANIFEST)
    (work / "begun.json").unlink()
    os.replace(work, path.resolve())


def require_place(path: Path) -> None:
    """Refuse a place where no folder can be made.

    Raises:
        Refused: a file or somebody's folder is there.
    """
    if path.is_file():
        raise Refused(f"{path} is a file", "give --cache-teacher a folder that is not there yet")
    if path.is_dir() and any(path.iterdir()):
        SignalFolder.open(path)
