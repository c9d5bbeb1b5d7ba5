"""Pack one file, and unpack one: chunks are read, coded on several threads and written in order."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from aicompress.checkpoint.packed.chunked import TensorChunk, parts_of
from aicompress.checkpoint.packed.raw_header import Extent, RawHeader
from aicompress.checkpoint.packed.reader import OpenedPackedFile, damaged, decoded, read_at
from aicompress.checkpoint.packed.writer import FileWriter, PackedFile
from aicompress.lossless import chunks
from aicompress.lossless.chunks import Layout, best_difference
from aicompress.lossless.difference import Difference
from aicompress.lossless.elements import element_of
from aicompress.pipeline.packing.plan import Base, Place
from aicompress.pipeline.step.options import Progress

SAMPLE = 1 << 17  # bytes at each of three places of a tensor by which its difference to a base is chosen
Done = Callable[[str, int], object]  # a tensor, and bytes of it that are done


@dataclass(frozen=True)
class CodedTensor:
    """How a tensor was packed.

    Attributes:
        nbytes: of its stream.
        layouts: of its chunks.
        difference: to the base.
    """

    nbytes: int
    layouts: frozenset[Layout]
    difference: Difference


@dataclass(frozen=True)
class PackedResult:
    """A file that was packed.

    Attributes:
        header: of the file that was packed.
        file: the packed file, all of it but its header.
        nbytes: of the packed file.
        sha256: of the file that was packed.
        tensors: how each was coded.
        base: names of the base's files that it is the difference to.
    """

    header: RawHeader
    file: PackedFile
    nbytes: int
    sha256: str
    tensors: dict[str, CodedTensor]
    base: frozenset[str]


@dataclass(frozen=True)
class _Job:
    """A chunk to be coded."""

    part: TensorChunk
    source: Place
    base: Place | None
    difference: Difference

    def read(self) -> bytes:
        return read_at(self.source.file, self.source.extent.begin + self.part.begin, self.part.size)

    def reference(self) -> bytes | None:
        return None if self.base is None else reference_of(self.base, self.part)


def counted(progress: Progress, headers: Iterable[RawHeader]) -> Done:
    """What tells the progress through the data of several files."""
    total = sum(extent.nbytes for header in headers for extent in header.extents.values())
    so_far = 0

    def done(tensor: str, size: int) -> None:
        nonlocal so_far
        so_far += size
        progress(tensor, so_far, total)

    return done


def reference_of(base: Place, part: TensorChunk) -> bytes:
    """The bytes of a base's tensor that stand where a chunk does."""
    return read_at(base.file, base.extent.begin + part.begin, part.size)


def pack_file(
    path: Path, header: RawHeader, name: str, base: Base | None, target: tuple[FileWriter | None, str], done: Done
) -> PackedResult:
    """Pack a file; all but its header is written then, which `PackedFile.finish` adds.

    Args:
        path: the file.
        header: its header.
        name: how the base may call it.
        base: what it is stored as the difference to.
        target: takes the packed file, under a name; without a writer the bytes are only counted.
        done: told of progress.
    """
    places = {tensor: _place(base, name, tensor, extent) for tensor, extent in header.extents.items()}
    used = frozenset(base.source.name_of(place.file) for place in places.values() if base and place)
    packed = PackedFile(*target, header, path.stat().st_size, sorted(used))
    digest = hashlib.sha256(len(header.text).to_bytes(8, "little") + header.text)
    layouts: dict[str, set[Layout]] = {}
    differences: dict[str, Difference] = {}

    def code(job: _Job) -> tuple[bytes, bytes]:
        content = job.read()
        return content, chunks.encode(content, job.part.element, job.reference(), job.difference)

    for job, (content, coded) in in_order(_jobs(path, header, places), code):
        digest.update(content)
        packed.append(job.part.name, coded)
        layouts.setdefault(job.part.name, set()).add(Layout(coded[0] & 15))
        differences[job.part.name] = job.difference
        if job.part.is_last:
            packed.end()
        done(job.part.name, job.part.size)
    tensors = {
        tensor: CodedTensor(
            packed.stored(tensor), frozenset(layouts.get(tensor, ())), differences.get(tensor, Difference.NONE)
        )
        for tensor in header.extents
    }
    return PackedResult(header, packed, packed.nbytes, digest.hexdigest(), tensors, used)


def _place(base: Base | None, name: str, tensor: str, extent: Extent) -> Place | None:
    return None if base is None else base.reference(name, tensor, extent)


def _jobs(path: Path, header: RawHeader, places: dict[str, Place | None]) -> Iterator[_Job]:
    """The chunks of a file in the order in which they lie."""
    for tensor, extent in header.extents.items():
        source, base = Place(path, extent), places[tensor]
        kind = Difference.NONE if base is None else _chosen(tensor, source, base)
        yield from (_Job(part, source, base, kind) for part in parts_of(tensor, extent))


def _chosen(tensor: str, source: Place, base: Place) -> Difference:
    """The difference by which those of three samples of a tensor are coded shortest that are not the base's."""
    nbytes = source.extent.nbytes
    element = element_of(source.extent.dtype)
    size = min(SAMPLE, nbytes) // element.width * element.width
    begins = sorted({0, (nbytes - size) // 2 // 8 * 8, (nbytes - size) // 8 * 8})
    samples = [TensorChunk(tensor, element, begin, size, False) for begin in begins]
    pairs = [(reference_of(source, part), reference_of(base, part)) for part in samples]
    unlike = [(one, other) for one, other in pairs if one != other]
    return best_difference(unlike, element) if unlike else Difference.XOR


def unpack_file(
    packed: OpenedPackedFile, name: str, base: Base | None, target: tuple[FileWriter | None, str], done: Done
) -> None:
    """Write the file that a packed one holds; without a writer it is only checked.

    Args:
        packed: the packed file.
        name: how the base may call the file that it holds.
        base: what it is the difference to.
        target: takes the file, under a name.
        done: told of progress.

    Raises:
        CheckpointError: a chunk cannot be decoded, or what comes out is not what was packed.
    """
    writer, out = target
    header = packed.header
    places = {tensor: _place(base, name, tensor, extent) for tensor, extent in header.extents.items()}
    start = len(header.text).to_bytes(8, "little") + header.text
    digest = hashlib.sha256(start)
    if writer is not None:
        writer.create(out)
        writer.write(out, start, 0)
    position = len(start)

    def decode(job: tuple[TensorChunk, bytes | None]) -> memoryview:
        part, coded = job
        place = places[part.name]
        reference = None if place is None else reference_of(place, part)
        if coded is not None:
            return decoded(packed.path, coded, part, reference)
        if reference is None:
            raise damaged(packed.path, f"it lacks the stream of {part.name!r}")
        return memoryview(reference)

    for (part, _), content in in_order(packed.parts(), decode):
        digest.update(content)
        if writer is not None:
            writer.write(out, content, position)
        position += part.size
        done(part.name, part.size)
    if digest.hexdigest() != packed.manifest.sha256:
        raise damaged(packed.path, "what it unpacks to has not the sha256 of what was packed")


AHEAD = 3  # jobs begun or done for each thread before the first result is taken
Job = TypeVar("Job")
Result = TypeVar("Result")


def in_order(jobs: Iterable[Job], work: Callable[[Job], Result]) -> Iterator[tuple[Job, Result]]:
    """Every job with its result, in the order of the jobs, on as many threads as torch has.

    The work must release the interpreter's lock for the most part, as reading, numpy and Zstandard do.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield from ((job, work(job)) for job in jobs)
        return
    waiting: deque[tuple[Job, Future[Result]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for job in jobs:
                waiting.append((job, pool.submit(work, job)))
                if len(waiting) > AHEAD * threads:
                    first, result = waiting.popleft()
                    yield first, result.result()
            while waiting:
                first, result = waiting.popleft()
                yield first, result.result()
        finally:
            for _, result in waiting:
                result.cancel()
