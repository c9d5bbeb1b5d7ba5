"""A bundle reads as the file that it stands for; one that is damaged is refused, whatever it claims."""

from __future__ import annotations

import contextlib
import json
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from aicompress.checkpoint import bundle
from aicompress.checkpoint.files import read_tensor
from aicompress.checkpoint.header import build_bundle, read_header
from aicompress.errors import CheckpointError
from aicompress.weights import TensorSpec

SPECS = {
    "b": TensorSpec(torch.uint8, (3,)),
    "a": TensorSpec(torch.float32, (2, 2)),
    "empty": TensorSpec(torch.int8, (0,)),
}
METADATA = {"aicompress": json.dumps({"entries": {}}, separators=(",", ":")), "said": "12"}
DATA = bytes(range(19))


def written(path: Path, description: bytes, data: bytes = DATA) -> Path:
    """Write a file whose one tensor is this."""
    whole = torch.tensor([*description, *data], dtype=torch.uint8)
    save_file({bundle.NAME: whole}, path, dict(bundle.MARK))
    return path


def deflated(text: bytes) -> bytes:
    """Return a description of any text."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=bundle._DICTIONARY)
    packed = squeeze.compress(text) + squeeze.flush()
    return len(packed).to_bytes(bundle.PREFIX, "little") + packed


def test_reads_as_what_it_stands_for(tmp_path: Path) -> None:
    first, begins = build_bundle(SPECS, METADATA)
    path = tmp_path / "bundle.safetensors"
    path.write_bytes(first + DATA)
    header = read_header(path)
    assert {name: ref.spec for name, ref in header.tensors.items()} == SPECS
    assert {name: ref.begin for name, ref in header.tensors.items()} == begins
    assert header.metadata == METADATA
    assert read_tensor(header.tensors["b"], "b").tolist() == [0, 1, 2]
    assert read_tensor(header.tensors["a"], "a").view(torch.uint8).flatten().tolist() == list(range(3, 19))


@pytest.mark.parametrize(
    ("description", "data"),
    [
        (b"", b""),
        (b"\xff\xff\xff\xff", DATA),
        (deflated(b"{}"), DATA),
        (deflated(b"no json"), DATA),
        (deflated(b'{"tensors":{"a":["F32",[2]]},"metadata":{}}'), DATA),  # less than there is
        (deflated(b'{"tensors":{"a":["F32",[99]]},"metadata":{}}'), DATA),  # more
        (deflated(b'{"tensors":{"a":["F99",[2]]},"metadata":{}}'), bytes(8)),
        (deflated(b'{"tensors":{"a":["F32",[-2]]},"metadata":{}}'), bytes(8)),
        (deflated(b'{"tensors":{"a":["F32"]},"metadata":{}}'), bytes(8)),
        (deflated(b'{"tensors":{"a":["U8",[8]],"a":["U8",[8]]},"metadata":{}}'), bytes(8)),
        (deflated(b'{"tensors":[],"metadata":{}}'), b""),
        (deflated(b" " * (bundle.LONGEST + 1)), DATA),  # 16 KB that would be as much memory as they claim
        (deflated(b'{"tensors":{"a":["U8",[19]]},"metadata":{}}')[:-3], DATA),
    ],
)
def test_what_is_damaged_is_refused(tmp_path: Path, description: bytes, data: bytes) -> None:
    path = written(tmp_path / "damaged.safetensors", description, data)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert "\n" not in caught.value.message


def test_any_byte_may_be_another(tmp_path: Path) -> None:
    first, _ = build_bundle(SPECS, METADATA)
    path = tmp_path / "bundle.safetensors"
    for place in range(len(first)):
        changed = bytearray(first + DATA)
        changed[place] ^= 0x55
        path.write_bytes(changed)
        with contextlib.suppress(CheckpointError):  # and no other error
            tensors = read_header(path).tensors
            assert all(ref.begin + ref.spec.nbytes <= len(changed) for ref in tensors.values())
