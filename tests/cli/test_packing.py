"""`pack` and `unpack`: what comes back is the same to the byte, or nothing does."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from aicompress.checkpoint.header import PACKED
from aicompress.checkpoint.packed import chunked
from aicompress.checkpoint.packed.raw_header import read_raw_header
from aicompress.errors import CheckpointError
from aicompress.lossless import chunks
from aicompress.pipeline.packing import pack
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.verify import check_packed
from tests.cli.calls import Call, refused
from tests.cli.test_written_files import files_up_to

RNG = np.random.default_rng(0)
WEIGHTS = (RNG.standard_normal(40_000) * 0.02).astype(np.float32)
UPPER = (WEIGHTS.view(np.uint32) >> 16).astype(np.uint16)
TUNED = ((WEIGHTS * (1 + RNG.standard_normal(40_000) / 300)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
Tensors = Mapping[str, tuple[str, list[int], bytes]]

EVERY: Tensors = {
    "f32": ("F32", [200, 200], WEIGHTS.tobytes()),
    "f32.bf16": ("F32", [100, 400], (WEIGHTS.view(np.uint32) & 0xFFFF0000).tobytes()),
    "f32.f16": ("F32", [40_000], WEIGHTS.astype(np.float16).astype(np.float32).tobytes()),
    "f64": ("F64", [3, 0, 7], b""),
    "f64.weight": ("F64", [5000], WEIGHTS[:5000].astype(np.float64).tobytes()),
    "bf16": ("BF16", [1, 40_000, 1], UPPER.tobytes()),
    "nan": ("F32", [5], np.array([0x7F800001, 0xFFC12345, 0x80000000, 1, 0xFF800000], np.uint32).tobytes()),
    "f16": ("F16", [], b"\x01\x80"),
    "f8": ("F8_E4M3", [1000], bytes(range(250)) * 4),
    "e8": ("F8_E8M0", [3], b"\x7f\x7e\xff"),
    "packed": ("I32", [100, 8], RNG.bytes(3200)),
    "ids": ("I64", [1, 300], np.arange(300).tobytes()),
    "mask": ("BOOL", [4096], bytes([1, 0, 0, 1] * 1024)),
    "complex": ("C64", [7], RNG.bytes(56)),
    "f4": ("F4", [6, 2], RNG.bytes(6)),
    "unknown": ("F99_X", [3], b"abcde"),
    "scalar": ("I64", [], bytes(8)),
    "header": ("U8", [1], b"x"),
    "empty": ("F32", [0], b""),
    "ünï \U0001f600": ("U8", [2, 3], b"abcdef"),
}


def write(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None, padding: int = 0) -> Path:
    """A safetensors file, byte by byte: of any dtypes, tensors out of order, its header padded."""
    plain: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    begin = 0
    for name, (dtype, shape, content) in tensors.items():
        plain[name] = {"data_offsets": [begin, begin + len(content)], "dtype": dtype, "shape": shape}
        begin += len(content)
    text = json.dumps(dict(sorted(plain.items()))).encode() + b" " * padding
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(content for _, _, content in tensors.values()))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the reports of packing."""
    files = (path for path in folder.rglob("*") if path.is_file())
    named = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return {name: content for name, content in named.items() if not name.startswith(("pack.", "unpack."))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two shards and other files, one of them the report of an earlier step."""
    root = tmp_path_factory.mktemp("packing") / "in"
    shards = {"model-00001-of-00002.safetensors": dict(list(EVERY.items())[:8])}
    shards["model-00002-of-00002.safetensors"] = dict(list(EVERY.items())[8:])
    for number, (name, tensors) in enumerate(shards.items()):
        write(root / name, tensors, {"format": "pt", "note": "ä"} if number else None, padding=number)
    index = {"weight_map": {tensor: name for name, tensors in shards.items() for tensor in tensors}}
    for name, text in {
        "model.safetensors.index.json": json.dumps(index), "config.json": '{"model_type": "x"}',
        "report.json": '{"schema_version": 1, "tool_version": "0", "files": ["report.json"]}',
        "sub/deep/merges.txt": "a b", "pytorch_model.bin": "pickle", "tokenizer.json": "{}",
    }.items():  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    write(root / "2_Dense/model.safetensors", {"linear.weight": EVERY["f32"]})
    return root


@pytest.fixture(scope="module")
def packed(folder: Path) -> Path:
    """The same, packed."""
    out = folder.parent / "packed"
    pack.run(pack.make_plan(folder, Destination(out)), Options())
    return out


def test_a_folder_comes_back(call: Call, folder: Path, packed: Path, tmp_path: Path) -> None:
    code, out, err = call("unpack", packed, tmp_path / "back")
    assert (code, err) == (0, ""), err
    assert "unpack.report.html" in out
    assert contents(tmp_path / "back") == contents(folder)
    names = set(contents(packed))
    assert "model-00001-of-00002.packed.safetensors" in names
    assert "2_Dense/model.packed.safetensors" in names
    report = json.loads((packed / "pack.report.json").read_text())
    assert report["size"]["ratio"] < 0.75
    assert any("exactly bfloat16" in note for note in report["notes"])
    assert any("exactly float16" in note for note in report["notes"])
    for side in ("before", "after"):
        assert sum(report[side]["by_kind"].values()) == report[side]["weight_bytes"]
    assert report["after"]["bytes"] == sum(map(len, contents(packed).values()))


def test_a_dry_run_tells_the_exact_bytes(call: Call, folder: Path, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "in").symlink_to(folder)
    code, out, _ = call("pack", tmp_path / "in", tmp_path / "out", "--dry-run", "--json")
    plan = json.loads(out)
    assert code == 0
    assert plan["weight_files"] == {n: len(c) for n, c in contents(packed).items() if n.endswith(".packed.safetensors")}
    code, out, _ = call("unpack", packed, tmp_path / "out", "--dry-run", "--json")
    sizes = {name: len(content) for name, content in contents(folder).items()}
    assert json.loads(out)["weight_files"] == {name: n for name, n in sizes.items() if name.endswith(".safetensors")}
    assert json.loads(out)["other_bytes"] == sum(n for name, n in sizes.items() if not name.endswith(".safetensors"))
    assert not (tmp_path / "out").exists()
    assert "becomes" in call("pack", folder, tmp_path / "out", "--dry-run")[1]


def test_a_single_file(call: Call, tmp_path: Path) -> None:
    """To a file and to a folder; hidden files and links that lead out of a folder are named."""
    source = write(tmp_path / "in" / "a b.safetensors", EVERY)
    assert call("pack", source, tmp_path / "small.safetensors", "-q") == (0, "", "")
    assert json.loads((tmp_path / "small.report.json").read_text())["command"] == "pack"
    assert call("unpack", tmp_path / "small.safetensors", tmp_path / "back.safetensors", "-q")[0] == 0
    assert (tmp_path / "back.safetensors").read_bytes() == source.read_bytes()
    (source.parent / ".secret").write_text("x")
    (source.parent / "deep" / ".hidden").mkdir(parents=True)
    (source.parent / "link").symlink_to(tmp_path / "small.report.json")
    code, out, _ = call("pack", source.parent, tmp_path / "folder")
    assert code == 0
    assert "warning: not taken along: .secret, deep/.hidden" in out
    assert "warning: links out of the folder, left out: link" in out
    assert call("unpack", tmp_path / "folder", tmp_path / "again", "-q")[0] == 0
    assert contents(tmp_path / "again") == {"a b.safetensors": source.read_bytes()}


def test_shards_of_an_index(call: Call, folder: Path, tmp_path: Path) -> None:
    assert call("pack", folder / "model.safetensors.index.json", tmp_path / "out", "-q")[0] == 0
    assert call("unpack", tmp_path / "out", tmp_path / "back", "-q")[0] == 0
    expected = {name: content for name, content in contents(folder).items() if not name.startswith("2_Dense")}
    assert contents(tmp_path / "back") == expected


def test_outputs_are_replaced_only_where_they_are_ours(call: Call, folder: Path, packed: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.safetensors", EVERY)
    for command, files, name in (
        ("pack", folder, "packed"), ("unpack", packed, "back"),
        ("pack", source, "small.safetensors"), ("unpack", tmp_path / "small.safetensors", "again.safetensors"),
    ):  # fmt: skip
        out = tmp_path / name
        assert call(command, files, out, "-q")[0] == 0
        assert "exists" in refused(call(command, files, out, "-q"))
        assert call(command, files, out, "-q", "--overwrite") == (0, "", "")
    (tmp_path / "back" / "mine.txt").write_text("mine")
    assert "did not write mine.txt" in refused(call("unpack", packed, tmp_path / "back", "--overwrite"))
    (tmp_path / "again.safetensors").write_bytes(source.read_bytes() + b" ")
    assert "did not write" in refused(
        call("unpack", tmp_path / "small.safetensors", tmp_path / "again.safetensors", "--overwrite")
    )


def test_differences_to_a_base(call: Call, tmp_path: Path) -> None:
    """Equal tensors cost nothing, near ones little; another base is refused."""
    base = {"a": ("BF16", [200, 200], UPPER.tobytes()), "b": ("F32", [200, 200], WEIGHTS.tobytes())}
    tuned = {**base, "a": ("BF16", [200, 200], TUNED.tobytes()), "new": ("U8", [3], b"abc")}
    write(tmp_path / "base" / "model.safetensors", base, {"format": "pt"})
    source = write(tmp_path / "tuned" / "weights.safetensors", tuned)
    sizes = {}
    for name, more in (("alone", ()), ("small", ("--base", tmp_path / "base"))):
        code, _, err = call("pack", source, tmp_path / f"{name}.safetensors", "-q", *more)
        assert (code, err) == (0, "")
        streams = read_raw_header(tmp_path / f"{name}.safetensors").extents
        sizes[name] = {tensor: stream.nbytes for tensor, stream in streams.items()}
    assert "b" not in sizes["small"]
    assert sizes["small"]["a"] < 0.6 * sizes["alone"]["a"]
    small, back = tmp_path / "small.safetensors", tmp_path / "back.safetensors"
    assert "difference to a base" in refused(call("unpack", small, back))
    assert call("unpack", small, back, "--base", tmp_path / "base" / "model.safetensors", "-q")[0] == 0
    assert back.read_bytes() == source.read_bytes()
    assert "can only be checked by unpacking" in call("verify", small)[1]
    write(tmp_path / "base" / "model.safetensors", base, {"format": "PT"})
    back.unlink()
    assert "is not the base" in refused(call("unpack", small, back, "--base", tmp_path / "base"))
    assert "is packed" in refused(call("pack", source, tmp_path / "no.safetensors", "--base", small))
    assert not back.exists()


def test_refusals(call: Call, folder: Path, packed: Path, tmp_path: Path) -> None:
    assert "holds others beside its weights" in refused(call("pack", folder, tmp_path / "out.safetensors"))
    assert "is not packed" in refused(call("unpack", folder, tmp_path / "out"))
    assert "is packed" in refused(call("pack", packed, tmp_path / "out"))
    assert "holds no safetensors file" in refused(call("pack", tmp_path, tmp_path / "out"))
    assert "does not exist" in refused(call("pack", tmp_path / "none", tmp_path / "out"))
    assert "lies inside the input" in refused(call("pack", folder, folder / "out"))
    shutil.copytree(packed, tmp_path / "twice")
    write(tmp_path / "twice" / "model-00001-of-00002.safetensors", EVERY)
    assert "beside what unpacks to it" in refused(call("unpack", tmp_path / "twice", tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["twice"]


def test_nothing_else_reads_a_packed_checkpoint(call: Call, tiny_llama: Path, packed: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import aicompress

    llama = tmp_path / "llama"
    assert call("pack", tiny_llama, llama, "-q")[0] == 0
    for arguments in (
        ("inspect", llama), ("quantize", llama, tmp_path / "q", "-r", "quantize/rtn-w4"), ("inspect", packed),
        ("export", llama / "model.packed.safetensors", tmp_path / "q", "--to", "dense"),
        ("eval", llama, "-r", "eval/size-and-speed"),
    ):  # fmt: skip
        result = call(*arguments)
        assert "is packed" in refused(result)
        assert "aicompress unpack" in result[2]
    with pytest.raises(CheckpointError, match="is packed"):
        aicompress.load(llama)
    with pytest.raises(OSError, match="no file named model"):
        AutoModelForCausalLM.from_pretrained(llama)
    shutil.move(llama / "model.packed.safetensors", llama / "model.safetensors")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(llama)
    with safe_open(llama / "model.safetensors", "pt") as file:
        assert "aicompress unpack" in file.metadata()["format"]


def test_a_packed_checkpoint_is_verified(call: Call, packed: Path, tmp_path: Path) -> None:
    code, out, _ = call("verify", packed)
    assert (code, "sha256 of 3 unpacked files" in out) == (0, True), out
    shutil.copytree(packed / "2_Dense", tmp_path / "parts" / "dense")
    assert "sha256 of 1 unpacked file" in call("verify", tmp_path / "parts")[1]
    shutil.rmtree(tmp_path / "parts")
    shutil.copytree(packed, tmp_path / "damaged")
    file = tmp_path / "damaged" / "model-00001-of-00002.packed.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, out, _ = call("verify", tmp_path / "damaged")
    assert code == 2
    assert "is damaged" in out
    assert "is damaged" in refused(call("unpack", tmp_path / "damaged", tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed file of few bytes."""
    root = tmp_path_factory.mktemp("small")
    tensors = {"a": ("F32", [300], WEIGHTS[:300].tobytes()), "b": ("I64", [40], bytes(320)), "c": ("F16", [], b"ab")}
    source = write(root / "in.safetensors", tensors)
    pack.run(pack.make_plan(source, Destination(root / "small.safetensors")), Options())
    return root / "small.safetensors"


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_damage_is_seen(small: Path, data: st.DataObject) -> None:
    """Whatever byte changes or is lost: one line, or it unpacks to what was packed (padding may change)."""
    content = bytearray(small.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] ^= data.draw(st.integers(1, 255))
    else:
        del content[at:]
    damaged = small.with_name("damaged.safetensors")
    damaged.write_bytes(content)
    checked = check_packed("damaged", [damaged])
    assert len(checked.checks) + len(checked.problems) == 1
    assert not any("\n" in problem for problem in checked.problems)


def altered(path: Path, out: Path, tensors: Tensors, **changes: Any) -> Path:
    """A packed file with other streams and another manifest."""
    raw = read_raw_header(path)
    manifest = json.loads(raw.metadata[PACKED]) | changes
    content = path.read_bytes()
    streams = {name: ("U8", [e.nbytes], content[e.begin : e.begin + e.nbytes]) for name, e in raw.extents.items()}
    return write(out, {**streams, **tensors}, {**raw.metadata, PACKED: json.dumps(manifest)})


def test_bombs(call: Call, small: Path, tmp_path: Path) -> None:
    """A stream of few bytes cannot claim many, nor a header."""
    out = tmp_path / "out.safetensors"
    zeros = chunks.coder.zstandard.ZstdCompressor().compress(bytes(1 << 26))
    plane = bytes([1]) + len(zeros).to_bytes(4, "little") + zeros  # a chunk of one plane
    bomb = ("U8", [len(plane) + 4], len(plane).to_bytes(4, "little") + plane)
    huge = json.dumps({"a": {"dtype": "U8", "shape": [1 << 50], "data_offsets": [0, 1 << 50]}}).encode()
    claim = ("U8", [len(huge) + 5], (len(huge) + 1).to_bytes(4, "little") + b"\0" + huge)
    large = {"nbytes": 8 + len(huge) + (1 << 50), "header_nbytes": len(huge)}
    tracemalloc.start()
    for bad, told in (
        (altered(small, tmp_path / "1.safetensors", {"header": bomb}), "is damaged"),
        (altered(small, tmp_path / "2.safetensors", {"a": bomb}), "is damaged"),
        (altered(small, tmp_path / "3.safetensors", {"header": bomb}, header_nbytes=1 << 26), "is damaged"),
        (
            altered(small, tmp_path / "4.safetensors", {"header": claim}, **large),
            "claims more than its stream can hold",
        ),
        (altered(small, tmp_path / "5.safetensors", {}, header_nbytes=1 << 60), "malformed"),
        (altered(small, tmp_path / "6.safetensors", {}, version=2), "newer"),
        (altered(small, tmp_path / "7.safetensors", {"x": ("U8", [0], b"")}), "of no tensor"),
    ):
        assert told in refused(call("unpack", bad, out))
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
    assert not out.exists()


def test_a_full_disk_leaves_nothing(call: Call, folder: Path, packed: Path, tmp_path: Path) -> None:
    for command, source in (("pack", folder), ("unpack", packed)):
        with files_up_to(100_000):
            refused(call(command, source, tmp_path / "out"), 1)
        assert not [*tmp_path.iterdir()]


def test_memory_is_that_of_some_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And threads change neither that much nor any byte."""
    many = np.tile(WEIGHTS, 30).tobytes()
    source = write(tmp_path / "in.safetensors", {"w": ("F32", [len(many) // 4], many)})
    monkeypatch.setattr(chunked, "CHUNK", 1 << 16)
    packed = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        out = tmp_path / f"{threads}.safetensors"
        plan = pack.make_plan(source, Destination(out))
        tracemalloc.start()
        pack.measured(plan, lambda what, done, total: None)
        assert tracemalloc.get_traced_memory()[1] < len(many) / 2
        tracemalloc.stop()
        pack.run(plan, Options())
        tracemalloc.start()
        assert check_packed("out", [out]).checks == ("sha256 of 1 unpacked file",)
        assert tracemalloc.get_traced_memory()[1] < len(many) / 2
        tracemalloc.stop()
        packed.append(out.read_bytes())
    assert packed[0] == packed[1]
