"""Read packed files without trusting them: nothing they claim takes more memory than some chunks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from aicompress.checkpoint.header import PACKED
from aicompress.checkpoint.packed.chunked import LENGTH, TensorChunk, parts_of
from aicompress.checkpoint.packed.manifest import PackedManifest
from aicompress.checkpoint.packed.raw_header import Extent, RawHeader, parse_raw_header, read_raw_header
from aicompress.errors import CheckpointError
from aicompress.lossless import chunks
from aicompress.lossless.chunks import CHUNK


@dataclass(frozen=True)
class OpenedPackedFile:
    """A packed file whose claims have been checked as far as headers go.

    Attributes:
        path: the file.
        manifest: what it says of itself.
        streams: its byte streams by tensor.
        header: of the file that it unpacks to.
    """

    path: Path
    manifest: PackedManifest
    streams: Mapping[str, Extent]
    header: RawHeader

    @classmethod
    def open(cls, path: Path) -> OpenedPackedFile:
        """Read the headers of a packed file, its own and the one that it holds.

        Raises:
            CheckpointError: it is not packed, damaged, or claims more than it holds.
        """
        raw = read_raw_header(path)
        manifest = PackedManifest.from_metadata(raw.metadata, path)
        streams = raw.extents
        if manifest.header not in streams or any(extent.dtype != "U8" for extent in streams.values()):
            raise damaged(path, "it lacks streams")
        whole = Extent("U8", (manifest.header_nbytes,), 0, manifest.header_nbytes)
        text = b"".join(
            decoded(path, coded, part, None)
            for part, coded in coded_parts(path, manifest.header, whole, streams[manifest.header])
        )
        header = parse_raw_header(path, text, manifest.nbytes)
        opened = cls(path, manifest, streams, header)
        opened._check_streams()
        return opened

    def _check_streams(self) -> None:
        """Every tensor has a stream that can hold it, or lies in a base."""
        for name, extent in self.header.extents.items():
            stream = self.streams.get(name)
            if stream is None and extent.nbytes and not self.manifest.base:
                raise damaged(self.path, f"it lacks the stream of {name!r}")
            if stream is not None and stream.nbytes < (LENGTH + 1) * -(-extent.nbytes // CHUNK):
                raise damaged(self.path, f"{name!r} claims more than its stream can hold")
        strangers = self.streams.keys() - self.header.extents.keys() - {self.manifest.header}
        if strangers:
            raise damaged(self.path, f"it has a stream {min(strangers)!r} of no tensor")

    def parts(self) -> Iterator[tuple[TensorChunk, bytes | None]]:
        """Every chunk of the data in the order of the file, with its code; None: it is the base's."""
        for name, extent in self.header.extents.items():
            if name in self.streams:
                yield from coded_parts(self.path, name, extent, self.streams[name])
            else:
                yield from ((part, None) for part in parts_of(name, extent))


def coded_parts(path: Path, name: str, extent: Extent, stream: Extent) -> Iterator[tuple[TensorChunk, bytes]]:
    """The chunks of a tensor with their codes, read one after the other.

    Raises:
        CheckpointError: the stream does not hold them exactly.
    """
    position, end = stream.begin, stream.begin + stream.nbytes
    for part in parts_of(name, extent):
        length = int.from_bytes(read_at(path, position, LENGTH), "little")
        position += LENGTH
        if position + length > end or length > part.size + 1:
            raise damaged(path, f"the stream of {name!r} is cut off")
        yield part, read_at(path, position, length)
        position += length
    if position != end:
        raise damaged(path, f"the stream of {name!r} is too long")


def decoded(path: Path, coded: bytes, part: TensorChunk, reference: bytes | None) -> memoryview:
    """The bytes of a chunk.

    Raises:
        CheckpointError: the code is damaged.
    """
    try:
        return chunks.decode(coded, part.size, part.element, reference).data
    except ValueError as error:
        raise damaged(path, f"{part.name!r} cannot be decoded: {error}") from error


def read_at(path: Path, begin: int, size: int) -> bytes:
    """Bytes of a file.

    Raises:
        CheckpointError: they cannot be read, or the file has become shorter.
    """
    try:
        with path.open("rb", buffering=0) as file:
            content = os.pread(file.fileno(), size, begin)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", "check the disk it is on") from error
    if len(content) != size:
        raise CheckpointError(f"{path} ended while it was read", "something is changing the input")
    return content


def is_packed(path: Path) -> bool:
    """Whether a safetensors file is packed; errors as of `read_raw_header`."""
    return PACKED in read_raw_header(path).metadata


def damaged(path: Path, why: str) -> CheckpointError:
    """The error of a packed file that is not as it was written."""
    return CheckpointError(f"{path} is damaged: {why}", "pack or download it again")
