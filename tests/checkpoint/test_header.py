"""Headers are parsed without trusting them, and built so that any reader finds every byte."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from aicompress.checkpoint.header import DTYPES, Header, build_header, read_header
from aicompress.errors import CheckpointError
from aicompress.weights import TensorSpec

FUZZ = settings(max_examples=75, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file with any header, JSON or raw."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert "\n" not in caught.value.message
    return caught.value.message


def attempt(path: Path) -> Header | CheckpointError:
    """The header or the refusal; any other exception fails the test."""
    try:
        return read_header(path)
    except CheckpointError as error:
        return error


def consistent(path: Path, header: Header | CheckpointError) -> None:
    """One line that refuses; or every tensor lies inside the file and the tensors cover the data exactly."""
    if isinstance(header, CheckpointError):
        assert header.message
        assert "\n" not in header.message
        return
    spans = sorted((ref.begin, ref.begin + ref.spec.nbytes) for ref in header.tensors.values())
    assert all(begin <= end <= path.stat().st_size for begin, end in spans)
    assert all(end == begin for (_, end), (begin, _) in pairwise(spans))
    assert all(isinstance(value, str) for value in header.metadata.values())


@pytest.mark.parametrize(
    ("header", "data", "why"),
    [
        ({"a": entry()}, b"\0" * 7, "end at byte"),
        ({"a": entry()}, b"\0" * 9, "end at byte"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12, "overlap"),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, b"\0" * 20, "hole"),
        ({"a": entry(offsets=(0, 4))}, b"\0" * 4, "its shape needs 8"),
        ({"a": entry(offsets=(8, 0))}, b"\0" * 8, "claims -8 bytes"),
        ({"a": entry(shape=(2**40, 2**40), offsets=(0, 8))}, b"\0" * 8, "malformed"),
        ({"a": entry(shape=(0, 2**62, 4), offsets=(0, 0))}, b"", "malformed"),
        ({"a": entry(shape=(10**9,), offsets=(0, 4 * 10**9))}, b"\0" * 8, "the file has"),
        ({"a": entry(shape=(-1,), offsets=(0, 4))}, b"\0" * 4, "malformed"),
        ({"a": entry(shape=(True,), offsets=(0, 4))}, b"\0" * 4, "malformed"),
        ({"a": entry(shape=(2.0,))}, b"\0" * 8, "malformed"),
        ({"a": {**entry(), "shape": {}}}, b"\0" * 8, "malformed"),
        ({"a": {**entry(), "dtype": ["F32"]}}, b"\0" * 8, "malformed"),
        ({"a": entry(offsets=(0, 8, 9))}, b"\0" * 8, "malformed"),
        ({"a": {"dtype": "F32"}}, b"", "malformed"),
        ({"a": None}, b"", "malformed"),
        ({"a": entry(dtype="F4")}, b"\0" * 8, "dtype 'F4'"),
        ({"__metadata__": {"step": 3}}, b"", "mapping of strings"),
        ({"__metadata__": ["a"]}, b"", "mapping of strings"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{}}', b"\0" * 8, "twice"),
        (b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8, "twice"),
        (b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8, "UTF-8"),
        ('{"a": {}}'.encode("utf-16"), b"", "UTF-8"),
        (b"\xff\xfe", b"", "UTF-8"),
        (b"[]", b"", "not a mapping"),
        (b"", b"", "JSON"),
        (b"[" * 200_000, b"", "JSON"),
        (b'{"a":' * 100_000, b"", "JSON"),
        (b"9" * 10_000, b"", "JSON"),
    ],
)  # fmt: skip
def test_a_lying_header_is_refused(tmp_path: Path, header: Any, data: bytes, why: str) -> None:
    assert why in refused(write(tmp_path / "a.safetensors", header, data))


@pytest.mark.parametrize("filling", [b"[],", b"{},", b'"a":{},'])
def test_a_header_of_brackets_is_refused_before_it_takes_memory(tmp_path: Path, filling: bytes) -> None:
    brackets = b'{"a":[' + filling * (3_000_000 // len(filling)) + b"[]]}"
    path = write(tmp_path / "a.safetensors", brackets)
    tracemalloc.start()
    assert "brackets" in refused(path)
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()


def test_a_shape_of_endless_numbers_is_refused_at_once(tmp_path: Path) -> None:
    shape = b",".join([b"9" * 4290] * 2000)
    start = time.process_time()
    path = write(tmp_path / "a.safetensors", b'{"a":{"dtype":"F32","shape":[' + shape + b'],"data_offsets":[0,0]}}')
    assert "malformed" in refused(path)
    assert time.process_time() - start < 5
    path = write(tmp_path / "b.safetensors", {"a" * 1_000_000: entry(offsets=(0, 4))}, b"\0" * 4)
    assert len(refused(path)) < 400


def test_brackets_in_names_are_no_brackets(tmp_path: Path) -> None:
    tensors = {f'[[{{\\"{number}': torch.ones(1) for number in range(3)} | {"[" * 200: torch.ones(1)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"text": '[[["\\"' * 300_000})
    assert read_header(tmp_path / "a.safetensors").tensors.keys() == tensors.keys()


@pytest.mark.parametrize("content", [b"", b"\1", b"\xff" * 8, b"\xff" * 64, struct.pack("<Q", 99) + b"{}"])
def test_a_length_beyond_the_file_is_refused_without_reading_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    assert "header claims" in refused(path)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_what_is_not_a_readable_file_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "none.safetensors")
    assert "does not exist" in refused(tmp_path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "a.safetensors"
    tensors = {"fc.weight": torch.ones(4, 6), "fc.bias": torch.zeros(4), "n": torch.tensor(7), "é": torch.ones(0, 3)}
    save_file(tensors, path, metadata={"format": "pt"})
    return path.read_bytes()


@FUZZ
@given(st.data())
def test_damaged_files_are_refused_or_read_consistently(tmp_path: Path, sound: bytes, data: st.DataObject) -> None:
    """Cut anywhere, flip bytes, or put in some: a header comes out that fits the file, or one clear error."""
    damaged = bytearray(sound[: data.draw(st.integers(0, len(sound)))] if data.draw(st.booleans()) else sound)
    for _ in range(data.draw(st.integers(0, 4))):
        if damaged:
            damaged[data.draw(st.integers(0, min(len(damaged) - 1, 300)))] = data.draw(st.integers(0, 255))
    damaged += data.draw(st.binary(max_size=4))
    path = tmp_path / "a.safetensors"
    path.write_bytes(damaged)
    consistent(path, attempt(path))


SIZES = st.one_of(st.integers(-1, 9), st.integers(2**31, 2**70), st.booleans(), st.floats(), st.none(), st.text())
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from([*DTYPES, "F4", ""]), st.none(), st.lists(st.integers())),
        "shape": st.one_of(st.lists(SIZES, max_size=4), st.none(), st.dictionaries(st.text(), st.integers())),
        "data_offsets": st.one_of(st.lists(st.integers(-4, 40), max_size=3), st.none(), st.text(max_size=2)),
    },
)


@FUZZ
@given(st.dictionaries(st.text(max_size=4), st.one_of(FIELDS, st.none(), st.text(), SIZES)), st.binary(max_size=40))
@example({"__metadata__": {"shape": None}}, b"")
def test_any_json_is_refused_or_read_consistently(tmp_path: Path, header: dict[str, Any], data: bytes) -> None:
    path = write(tmp_path / "a.safetensors", header, data)
    tracemalloc.start()
    consistent(path, attempt(path))
    assert tracemalloc.get_traced_memory()[1] < 2_000_000  # no declared shape is ever allocated
    tracemalloc.stop()


@FUZZ
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3)),
        max_size=6,
    ),
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), st.text(max_size=9), max_size=3),
)
def test_built_headers_read_back(tmp_path: Path, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    specs = {name: TensorSpec(DTYPES[dtype], tuple(shape)) for name, (dtype, shape) in tensors.items()}
    metadata.pop("format", None)
    header, begins = build_header(specs, metadata)
    path = tmp_path / "a.safetensors"
    path.write_bytes(header + b"\0" * sum(spec.nbytes for spec in specs.values()))
    found = read_header(path)
    assert {name: ref.spec for name, ref in found.tensors.items()} == specs
    assert {name: ref.begin for name, ref in found.tensors.items()} == begins
    assert found.metadata == {"format": "pt", **metadata}
    assert all(begin % specs[name].dtype.itemsize == 0 for name, begin in begins.items())  # aligned
    with safe_open(path, "pt") as opened:  # the library agrees
        assert set(opened.keys()) == set(specs)
        assert opened.metadata() == found.metadata


def test_every_dtype_of_the_library_has_its_name(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(2, dtype=dtype) for name, dtype in DTYPES.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    assert {name: ref.spec.dtype for name, ref in read_header(tmp_path / "a.safetensors").tensors.items()} == DTYPES
    assert load_file(tmp_path / "a.safetensors").keys() == DTYPES.keys()


def test_rewriting_in_place_keeps_the_length() -> None:
    specs = {"a": TensorSpec(torch.float32, (2,))}
    header, _ = build_header(specs, {"digest": "0" * 64})
    again, _ = build_header(specs, {"digest": "f" * 64}, length=len(header) - 8)
    assert len(again) == len(header)
    with pytest.raises(ValueError, match="are reserved"):
        build_header(specs, {"digest": "f" * 99}, length=len(header) - 8)
