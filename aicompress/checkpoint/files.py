"""What a checkpoint's weight files hold: all headers together, one tensor's bytes at a time, digests."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aicompress.checkpoint.header import TensorRef, read_header
from aicompress.checkpoint.source import Source
from aicompress.errors import CheckpointError
from aicompress.weights import TensorSpec
from aicompress.weights.coding.rows import row_slices, share

_CHUNK = 1 << 22  # bytes; with smaller ones the thread that hashes waits for the interpreter more than it works
EXPANSION = 10_000  # bytes that one stored byte may stand for; a factor of rank 1 in 16,000 columns is half of that
NARROW = 512  # columns that are read and written at a time at least, since each of their pieces takes a call
LEAST = 32  # of these where columns are long
SMALL = 1 << 20  # bytes that may always be decoded


def narrow(inputs: int, most: int) -> int:
    """Columns of a tensor that are read together: as many as are worth a call for each of so many inputs.

    Args:
        inputs: numbers in a column.
        most: numbers in all of them, unless fewer than `LEAST` columns would be.
    """
    columns = NARROW
    while columns > LEAST and columns * inputs > most:
        columns //= 2
    return columns


def require_likely(decoded: int, stored: int, name: str, path: Path) -> None:
    """Refuse a compressed parameter that would decode to more bytes than any weight of a model does.

    Raises:
        CheckpointError: it would.
    """
    if decoded > max(SMALL, EXPANSION * stored):
        raise CheckpointError(
            f"{path}: {name!r} would decode to {decoded:,} bytes from {stored:,}",
            f"more than {EXPANSION:,} for one is no weight of a model",
        )


def read_headers(source: Source) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """Every tensor of every file, and the strings of the first file's header.

    Raises:
        CheckpointError: a damaged file, a tensor in two files, or an index that does not say the truth.
    """
    tensors: dict[str, TensorRef] = {}
    metadata: dict[str, str] = {}
    for number, file in enumerate(source.files):
        header = read_header(file)
        twice = next((name for name in header.tensors if name in tensors), None)
        if twice is not None:
            raise CheckpointError(
                f"tensor {twice!r} is in {tensors[twice].file.name} and in {file.name}", "keep one copy"
            )
        tensors.update(header.tensors)
        metadata = header.metadata if number == 0 else metadata
    for name, file_name in source.weight_map.items():
        if name not in tensors or not tensors[name].file.as_posix().endswith(f"/{file_name}"):
            raise CheckpointError(
                f"the index says {name!r} is in {file_name}, and it is not", "download the checkpoint again"
            )
    return tensors, metadata


def read_tensor(ref: TensorRef, name: str) -> Tensor:
    """Read one tensor from disk into fresh memory.

    Raises:
        CheckpointError: the file cannot be read, or shrank since it was opened.
    """
    return _read(ref, [ref.begin], ref.spec, name)


def read_part(ref: TensorRef, name: str, part: slice, axis: int = 0) -> Tensor:
    """Read some entries of a tensor along an axis; errors as of `read_tensor`."""
    before, length, after = ref.spec.shape[:axis], ref.spec.shape[axis], ref.spec.shape[axis + 1 :]
    entry = math.prod(after) * ref.spec.dtype.itemsize
    begins = [ref.begin + (piece * length + part.start) * entry for piece in range(math.prod(before))]
    return _read(ref, begins, TensorSpec(ref.spec.dtype, (*before, part.stop - part.start, *after)), name)


def read_parts(ref: TensorRef, name: str, most: int) -> Iterator[tuple[int, Tensor]]:
    """Read a tensor in parts of about so many bytes, each with where it begins along the first axis."""
    length = ref.spec.shape[0] if ref.spec.shape else 0
    slices = row_slices(length, ref.spec.nbytes // max(1, length), most)
    if len(slices) < 2:
        yield 0, read_tensor(ref, name)
        return
    yield from ((part.start, read_part(ref, name, part)) for part in slices)


def read_rows(ref: TensorRef, name: str, axis: int | None, rows: slice, total: int) -> Tensor:
    """Read what a tensor holds of some rows of a weight.

    Args:
        ref, name: the tensor.
        axis: along which it holds them, in proportion; None: all of it belongs to all rows.
        rows, total: the rows, of so many.

    Raises:
        CheckpointError: as of `read_tensor`.
    """
    if axis is None or axis >= len(ref.spec.shape):
        return read_tensor(ref, name)
    return read_part(ref, name, share(ref.spec.shape[axis], rows, total), axis)


def _read(ref: TensorRef, begins: Sequence[int], spec: TensorSpec, name: str) -> Tensor:
    """A tensor of pieces of a file, all of one length, by where each of them begins; errors as of `read_tensor`."""
    buffer = np.empty(spec.nbytes, dtype=np.uint8)
    if not len(buffer):
        return torch.empty(spec.shape, dtype=spec.dtype)
    try:
        descriptor = os.open(ref.file, os.O_RDONLY)
        try:
            for begin, piece in zip(begins, buffer.reshape(len(begins), -1), strict=True):
                done = 0
                while done < len(piece):
                    count = os.preadv(descriptor, [piece[done:].data], begin + done)
                    if not count:
                        raise CheckpointError(
                            f"{ref.file} ended while {name!r} was read", "something is changing the input"
                        )
                    done += count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"{ref.file} cannot be read: {error.strerror}", "check the disk it is on") from error
    return torch.from_numpy(buffer).view(spec.dtype).reshape(spec.shape)


def require_finite(tensor: Tensor, name: str, path: Path) -> None:
    """Refuse NaN and infinity: every method would spread them.

    Raises:
        CheckpointError: naming the tensor and how many elements are bad.
    """
    if bad := count_not_finite(tensor):
        raise CheckpointError(
            f"{path}: {name!r} holds {bad} NaN or infinite values", "repair or re-export the checkpoint"
        )


def count_not_finite(tensor: Tensor) -> int:
    """How many elements are NaN or infinite."""
    if not tensor.dtype.is_floating_point or tensor.numel() == 0:
        return 0
    if tensor.dtype is torch.float32 and tensor.is_contiguous():
        flat = tensor.view(-1)
        if math.isfinite(float(torch.dot(flat, flat))):  # a third of the time; infinite where squares overflow
            return 0
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    if torch.isfinite(torch.stack(torch.aminmax(values))).all():
        return 0
    return int((~torch.isfinite(values)).sum())


def may_be_infinite(name: str) -> bool:
    """Whether a tensor is no weight or bias by its name: masks and bounds may be infinite."""
    return not name.rpartition(".")[2].startswith(("weight", "bias"))


def digests(source: Source, stopped: Callable[[], bool] = lambda: False) -> dict[str, str]:
    """sha256 of each weight file by name, or by its path below the checkpoint's folder; reads every byte once.

    Args:
        source: the checkpoint.
        stopped: asked now and then; what is returned after it said True is incomplete.
    """
    digests: dict[str, str] = {}
    chunk = memoryview(bytearray(_CHUNK))  # one for all: fresh memory costs as much as the read
    for file in source.files:
        digest = hashlib.sha256()
        with file.open("rb", buffering=0) as stream:
            while not stopped() and (count := stream.readinto(chunk)):
                digest.update(chunk[:count])
        digests[source.name_of(file)] = digest.hexdigest()
    return digests
