"""What a checkpoint's weight files hold: all headers together, one tensor's bytes at a time, digests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aicompress.checkpoint.header import TensorRef, read_header
from aicompress.checkpoint.source import Source
from aicompress.errors import CheckpointError

_CHUNK = 1 << 24  # bytes


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
        with ref.file.open("rb", buffering=0) as file:
            file.seek(ref.begin)
            view, done = buffer.data, 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(
                        f"{ref.file} ended while {name!r} was read", "something is changing the input"
                    )
                done += count
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
    if not tensor.dtype.is_floating_point or tensor.numel() == 0:
        return
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    if not torch.isfinite(torch.stack(torch.aminmax(values))).all():
        bad = int((~torch.isfinite(values)).sum())
        raise CheckpointError(
            f"{path}: {name!r} holds {bad} NaN or infinite values", "repair or re-export the checkpoint"
        )


def digests(source: Source, stopped: Callable[[], bool] = lambda: False) -> dict[str, str]:
    """sha256 of each weight file by name, or by its path below the checkpoint's folder; reads every byte once.

    Args:
        source: the checkpoint.
        stopped: asked now and then; what is returned after it said True is incomplete.
    """
    found: dict[str, str] = {}
    for file in source.files:
        digest = hashlib.sha256()
        with file.open("rb", buffering=0) as stream:
            while not stopped() and (chunk := stream.read(_CHUNK)):
                digest.update(chunk)
        found[source.name_of(file)] = digest.hexdigest()
    return found
