"""The safetensors header: parsed without trusting it, and built before any data is written.

A file is a little-endian u64 header length, that many bytes of JSON, then the data. The JSON maps tensor names to
dtype, shape and [begin, end) offsets into the data, and `__metadata__` to strings. The header of a bundle is read as
that of the file which it stands for.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aicompress.checkpoint import bundle
from aicompress.checkpoint.json_text import Twice, compact, parsed, plain_where_same, unique
from aicompress.errors import CheckpointError, Unsupported
from aicompress.weights import TensorSpec

HEADER_LIMIT = 100_000_000
LARGEST = 2**62  # elements; torch counts in int64
MOST_AXES = 64  # of a tensor, as torch has them
SHOWN = 100  # letters of a name in a message
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PACKED = "aicompress_packed"  # the key of a packed file's metadata
PACKED_SUFFIX = ".packed.safetensors"  # of a packed file in a folder, where no reader looks for weights


@dataclass(frozen=True)
class TensorRef:
    """Where a tensor's bytes are.

    Attributes:
        file: the safetensors file.
        spec: dtype and shape.
        begin: absolute offset of the first byte in the file.
    """

    file: Path
    spec: TensorSpec
    begin: int


@dataclass(frozen=True)
class Header:
    """A validated header."""

    tensors: dict[str, TensorRef]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Parse and validate the header of one file; no tensor data is read.

    Raises:
        CheckpointError: missing, truncated, not safetensors, packed, or offsets that do not tile the data exactly.
    """
    text, size = header_text(path)
    plain, metadata = parsed_header(path, text)
    if PACKED in metadata:
        raise packed_error(path)
    tensors = {name: _tensor(path, name, fields, 8 + len(text)) for name, fields in plain.items()}
    _check_tiling(path, tensors, 8 + len(text), size)
    if metadata.items() >= bundle.MARK.items() and [*tensors] == [bundle.NAME]:
        return _of_bundle(path, tensors[bundle.NAME])
    return Header(tensors, metadata)


def packed_error(path: Path) -> Unsupported:
    """The refusal of what `pack` wrote by everything that reads weights."""
    whole = path.parent if path.name.endswith(PACKED_SUFFIX) else path
    return Unsupported(f"{path} is packed", f"unpack it first: aicompress unpack {whole} OUT")


def header_text(path: Path) -> tuple[bytes, int]:
    """A header's JSON, padding included, and the size of the file; errors as of `read_header`."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist", "check the path")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > HEADER_LIMIT or 8 + length > size:
                raise damaged(path, f"its header claims {length} bytes and the file has {size}")
            return file.read(length), size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", "check its permissions") from error


def parsed_header(path: Path, text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """The entries of a header's JSON, which may be anything, and its metadata; errors as of `read_header`."""
    plain = _parse(path, text)
    metadata = plain.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged(path, "its metadata is not a mapping of strings")
    return plain, metadata


def _of_bundle(path: Path, whole: TensorRef) -> Header:
    """The header that a bundle's description stands for."""
    with path.open("rb") as file:
        file.seek(whole.begin)
        length = int.from_bytes(file.read(bundle.PREFIX), "little")
        packed = file.read(min(length, whole.spec.nbytes))
    base, end = whole.begin + bundle.PREFIX + length, whole.begin + whole.spec.nbytes
    try:
        plain = parsed(bundle.inflated(packed), unique)
        listed = {name: (dtype, shape) for name, (dtype, shape) in plain["tensors"].items()}
        metadata = {key: text if isinstance(text, str) else compact(text) for key, text in plain["metadata"].items()}
    except Twice as error:
        raise damaged(path, f"{shown(error.args[0])} is in its description twice") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged(path, "the description of its bundle is malformed") from error
    tensors: dict[str, TensorRef] = {}
    position = 0
    for name, (dtype, shape) in listed.items():
        tensors[name] = TensorRef(path, _spec(path, name, dtype, shape), base + position)
        position += tensors[name].spec.nbytes
    _check_tiling(path, tensors, base, end)
    return Header(tensors, metadata)


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    """The header's JSON mapping: UTF-8, every key once."""
    try:
        plain = parsed(raw, unique)
        if not isinstance(plain, dict):
            raise damaged(path, "its header is not a mapping")
        json.dumps(plain, ensure_ascii=False).encode("utf-8")  # lone surrogates could never be written again
    except Twice as error:
        raise damaged(path, f"{shown(error.args[0])} is in its header twice") from error
    except UnicodeError as error:
        raise damaged(path, "its header is not JSON in UTF-8") from error
    except ValueError as error:
        raise damaged(path, f"its header is not JSON in UTF-8: {str(error)[:SHOWN]}") from error
    return plain


def damaged(path: Path, why: str) -> CheckpointError:
    """The error of a file that is not what safetensors files are."""
    return CheckpointError(f"{path} is not a complete safetensors file: {why}", "download or copy it again")


def shown(name: str) -> str:
    """A name for a message, quoted and cut to what a line can hold."""
    return repr(name) if len(name) <= SHOWN else f"{name[:SHOWN]!r}..."


def checked_shape(sizes: Any) -> tuple[int, ...]:
    """A shape from JSON.

    Raises:
        TypeError, ValueError: it is none, or of more elements than torch can count.
    """
    if not isinstance(sizes, list) or len(sizes) > MOST_AXES:
        raise TypeError
    count = 1
    for size in sizes:
        if type(size) is not int or not 0 <= size <= LARGEST:
            raise ValueError
        count *= size or 1  # strides must fit, even of an empty tensor
        if count > LARGEST:  # at once: a product of many large numbers takes minutes
            raise ValueError
    return tuple(sizes)


def _tensor(path: Path, name: str, fields: Any, base: int) -> TensorRef:
    """One entry of the header, every field checked."""
    try:
        dtype, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not all(type(offset) is int and 0 <= offset < 1 << 63 for offset in (begin, end)):
            raise ValueError
    except (TypeError, KeyError, ValueError) as error:
        raise malformed(path, name) from error
    spec = _spec(path, name, dtype, shape)
    if end - begin != spec.nbytes:
        raise damaged(path, f"tensor {shown(name)} claims {end - begin} bytes, its shape needs {spec.nbytes}")
    return TensorRef(path, spec, base + begin)


def _spec(path: Path, name: str, dtype: Any, shape: Any) -> TensorSpec:
    """A tensor's dtype and shape, checked."""
    try:
        sizes = checked_shape(shape)
        if not isinstance(dtype, str):
            raise TypeError
    except (TypeError, ValueError) as error:
        raise malformed(path, name) from error
    if dtype not in DTYPES:
        message = f"{path}: tensor {shown(name)} has dtype {shown(dtype)}"
        raise Unsupported(message, f"supported: {', '.join(DTYPES)}")
    return TensorSpec(DTYPES[dtype], sizes)


def malformed(path: Path, name: str) -> CheckpointError:
    """The error of a tensor whose entry says nothing."""
    return damaged(path, f"the entry of tensor {shown(name)} is malformed")


def _check_tiling(path: Path, tensors: Mapping[str, TensorRef], base: int, size: int) -> None:
    """The data must be covered exactly once, in whatever order."""
    position = base
    for name, ref in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].spec.nbytes)):
        if ref.begin != position:
            raise damaged(path, f"a hole or an overlap in the data before tensor {shown(name)}")
        position += ref.spec.nbytes
    if position != size:
        raise damaged(path, f"its tensors end at byte {position} and the file has {size}")


def build_header(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, str], length: int | None = None
) -> tuple[bytes, dict[str, int]]:
    """A file's first bytes, and the absolute offset of each tensor.

    Wide dtypes come first, so that every tensor is aligned to its element size.

    Args:
        specs: tensors by name.
        metadata: strings; `format: pt` is always added, since some readers refuse files without it.
        length: pad the header's JSON to this many bytes, to rewrite one in place.

    Raises:
        ValueError: the header does not fit `length`.
    """
    ordered = sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize)  # stable: keeps the given order
    plain: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    begins: dict[str, int] = {}
    position = 0
    for name, spec in ordered:
        end = position + spec.nbytes
        plain[name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [position, end]}
        begins[name] = position
        position = end
    text = json.dumps(plain, separators=(",", ":"), ensure_ascii=False).encode()
    full = length if length is not None else math.ceil(len(text) / 8) * 8
    if len(text) > full:
        raise ValueError(f"header needs {len(text)} bytes, {full} are reserved")
    base = 8 + full
    return full.to_bytes(8, "little") + text.ljust(full), {name: base + begin for name, begin in begins.items()}


def build_bundle(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """A bundle's first bytes, up to the data, and the absolute offset of each tensor.

    Args:
        specs: tensors by name.
        metadata: as of the file that the bundle stands for; what is JSON is kept as such.
    """
    listed = {name: [DTYPE_NAMES[spec.dtype], list(spec.shape)] for name, spec in specs.items()}
    description = bundle.deflated(
        {"tensors": listed, "metadata": {k: plain_where_same(text) for k, text in metadata.items()}}
    )
    data = sum(spec.nbytes for spec in specs.values())
    whole = {bundle.NAME: TensorSpec(torch.uint8, (len(description) + data,))}
    first, _ = build_header(whole, bundle.MARK)
    begins: dict[str, int] = {}
    position = len(first) + len(description)
    for name, spec in specs.items():
        begins[name] = position
        position += spec.nbytes
    return first + description, begins
