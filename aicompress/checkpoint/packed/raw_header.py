"""The header of a file whose tensors are bytes and nothing more: their dtypes may be ones that torch does not have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aicompress.checkpoint.header import (
    DTYPES,
    checked_shape,
    damaged,
    header_text,
    malformed,
    parsed_header,
    shown,
)
from aicompress.weights import TensorSpec


@dataclass(frozen=True)
class Extent:
    """A tensor as a header names it.

    Attributes:
        dtype: its name in the header.
        shape: its shape.
        begin: absolute offset of the first byte in the file.
        nbytes: how many bytes it has.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


@dataclass(frozen=True)
class RawHeader:
    """A header of which everything but the dtypes is validated.

    Attributes:
        text: its JSON, padding included.
        extents: tensors by name, in the order in which their bytes lie; they cover the data exactly once.
        metadata: its strings.
    """

    text: bytes
    extents: dict[str, Extent]
    metadata: dict[str, str]


def read_raw_header(path: Path) -> RawHeader:
    """Parse the header of one file; no tensor data is read.

    Raises:
        CheckpointError: missing, truncated, not safetensors, or offsets that do not tile the data exactly.
    """
    text, size = header_text(path)
    return parse_raw_header(path, text, size)


def parse_raw_header(path: Path, text: bytes, size: int) -> RawHeader:
    """Parse and validate a header's text.

    Args:
        path: the file it is of, for messages.
        text: its JSON.
        size: bytes of the whole file.

    Raises:
        CheckpointError: not JSON, an entry that is malformed, or offsets that do not tile the data exactly.
    """
    plain, metadata = parsed_header(path, text)
    extents = {name: _extent(path, name, fields, 8 + len(text)) for name, fields in plain.items()}
    ordered = dict(sorted(extents.items(), key=lambda item: (item[1].begin, item[1].nbytes)))
    position = 8 + len(text)
    for name, extent in ordered.items():
        if extent.begin != position:
            raise damaged(path, f"a hole or an overlap in the data before tensor {shown(name)}")
        position += extent.nbytes
    if position != size:
        raise damaged(path, f"its tensors end at byte {position} and the file has {size}")
    return RawHeader(text, ordered, metadata)


def _extent(path: Path, name: str, fields: Any, base: int) -> Extent:
    """One entry of the header, every field checked."""
    try:
        dtype, shape, (begin, end) = fields["dtype"], checked_shape(fields["shape"]), fields["data_offsets"]
        if not isinstance(dtype, str):
            raise TypeError
        if not all(type(offset) is int and 0 <= offset < 1 << 63 for offset in (begin, end)):
            raise ValueError
    except (TypeError, KeyError, ValueError) as error:
        raise malformed(path, name) from error
    needed = TensorSpec(DTYPES[dtype], shape).nbytes if dtype in DTYPES else max(0, end - begin)
    if end - begin != needed:
        raise damaged(path, f"tensor {shown(name)} claims {end - begin} bytes, its shape needs {needed}")
    return Extent(dtype, shape, base + begin, needed)
