"""Write packed and unpacked files: their sizes are not known, or no tensors are, before the last byte."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from aicompress.checkpoint.header import HEADER_LIMIT
from aicompress.checkpoint.packed.chunked import LENGTH
from aicompress.checkpoint.packed.manifest import UNKNOWN, PackedManifest
from aicompress.checkpoint.packed.raw_header import RawHeader
from aicompress.checkpoint.writer import CheckpointWriter
from aicompress.disk import disk_errors, write_at
from aicompress.errors import CheckpointError
from aicompress.lossless import chunks
from aicompress.lossless.chunks import CHUNK, Layout
from aicompress.lossless.elements import BYTE

_SAME = bytes([Layout.SAME])
_FILE = "model.safetensors"  # of an output of one file, while it grows


class FileWriter(CheckpointWriter):
    """A writer of files whose bytes its user places; nothing of a stopped run is kept, since none can be resumed."""

    def __init__(self, out: Path, overwrite: bool, mode: int) -> None:
        super().__init__(out, (), overwrite=overwrite, mode=mode)

    def create(self, name: str) -> None:
        """Begin a file below the output's directory, or the output itself where that is one file."""
        path = self.work / (_FILE if self.single else name)
        with disk_errors(self.out):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open[name] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, self.mode)
        if not self.single:
            self._extra.append(path)

    def write(self, name: str, content: bytes | memoryview, begin: int) -> None:
        """Write bytes at a place of a file that has begun.

        Raises:
            OutOfSpace: the disk is full.
        """
        with disk_errors(self.out):
            write_at(self._open[name], memoryview(content), begin)

    def digests(self) -> dict[str, str]:
        """sha256 of each file that was created, by name."""
        hashed: dict[str, str] = {}
        for name, descriptor in self._open.items():
            os.lseek(descriptor, 0, os.SEEK_SET)
            with open(descriptor, "rb", closefd=False) as file:
                hashed[name] = hashlib.file_digest(file, "sha256").hexdigest()
        return hashed

    def _finished(self) -> Path:
        return self.work / _FILE if self.single else self.work

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, None if isinstance(error, KeyboardInterrupt) else error, trace)


class PackedFile:
    """A packed file that grows: streams one after the other, then its header in the place that was kept for it.

    Args:
        writer: takes the bytes; None counts them only.
        name: the file.
        source: header of the file that is packed.
        nbytes: size of that.
        base: names of the weight files that it is stored as the difference to.
    """

    def __init__(
        self, writer: FileWriter | None, name: str, source: RawHeader, nbytes: int, base: Collection[str]
    ) -> None:
        self._writer, self._name = writer, name
        self._axes = {tensor: len(extent.shape) for tensor, extent in source.extents.items()}
        header = "header"
        while header in source.extents:
            header += "_"
        self._manifest = PackedManifest(nbytes, len(source.text), header, base=dict.fromkeys(base, UNKNOWN))
        self._streams: dict[str, tuple[int, int]] = {}  # first and last byte after the header
        self._same = 0  # chunks so far of a tensor that may be all the same
        most = 2 * nbytes + 64  # no offset has more digits
        self._kept = len(self._text(dict.fromkeys([header, *source.extents], (most, 2 * most))))
        if self._kept > HEADER_LIMIT:
            raise CheckpointError(f"{name} has too many tensors: its header would be too long", "split it into shards")
        self.nbytes = 8 + self._kept
        if writer is not None:
            writer.create(name)
        for begin in range(0, len(source.text), CHUNK):
            self.append(header, chunks.encode(source.text[begin : begin + CHUNK], BYTE))

    def stored(self, tensor: str) -> int:
        """Bytes of a tensor's stream so far; 0 where it has none."""
        begin, end = self._streams.get(tensor, (0, 0))
        return end - begin

    def append(self, tensor: str, coded: bytes) -> None:
        """Add the next coded chunk of a tensor; one that is all the same as its reference gets no stream."""
        if coded == _SAME and tensor not in self._streams:
            self._same += 1
            return
        for chunk in (*(_SAME for _ in range(self._same)), coded):
            self._write(tensor, len(chunk).to_bytes(LENGTH, "little"))
            self._write(tensor, chunk)
        self._same = 0

    def end(self) -> None:
        """The tensor is complete."""
        self._same = 0

    def _write(self, tensor: str, content: bytes) -> None:
        if self._writer is not None:
            self._writer.write(self._name, content, self.nbytes)
        position = self.nbytes - 8 - self._kept
        begin, _ = self._streams.get(tensor, (position, position))
        self._streams[tensor] = (begin, position + len(content))
        self.nbytes += len(content)

    def finish(self, sha256: str, base: Mapping[str, str]) -> None:
        """Write the header, once the digests are known: of the file that was packed, and of the base's files."""
        self._manifest = replace(self._manifest, sha256=sha256, base=base)
        text = self._text(self._streams).ljust(self._kept)
        if self._writer is not None:
            self._writer.write(self._name, self._kept.to_bytes(8, "little") + text, 0)

    def _text(self, streams: Mapping[str, tuple[int, int]]) -> bytes:
        """The header's JSON. A stream has another number of axes than its tensor, so that nothing loads it as one."""
        plain: dict[str, object] = {"__metadata__": self._manifest.to_metadata()}
        for name, (begin, end) in streams.items():
            shape = [1, end - begin] if self._axes.get(name, 2) < 2 else [end - begin]
            plain[name] = {"dtype": "U8", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(plain, separators=(",", ":"), ensure_ascii=False).encode()
        return text.ljust(-(-len(text) // 8) * 8)
