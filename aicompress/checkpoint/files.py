"""What a checkpoint's weight files hold: all headers together, one tensor's bytes at a time, digests."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aicompress.checkpoint.header import TensorRef, read_header
from aicompress.checkpoint.source import Source
from aicompress.errors import CheckpointError

_CHUNK = 1 << 22  # bytes; with smaller ones the thread that hashes waits for the interpreter more than it works
EXPANSION = 10_000  # bytes that one stored byte may stand for; a factor of rank 1 in 16,000 columns is half of that
SMALL = 1 << 20  # bytes that may always be decoded


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its name."""
    return (str(error).splitlines() or [type(error).__name__])[0]


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
    buffer = np.empty(ref.spec.nbytes, dtype=np.uint8)
    try:
        descriptor = os.open(ref.file, os.O_RDONLY)
        try:
            view, done = buffer.data, 0
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], ref.begin + done)
                if not count:
                    raise CheckpointError(
                        f"{ref.file} ended while {name!r} was read", "something is changing the input"
                    )
                done += count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"{ref.file} cannot be read: {error.strerror}", "check the disk it is on") from error
    if not len(buffer):
        return torch.empty(ref.spec.shape, dtype=ref.spec.dtype)
    return torch.from_numpy(buffer).view(ref.spec.dtype).reshape(ref.spec.shape)


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
