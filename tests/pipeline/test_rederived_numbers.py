"""Every number of a report's sizes and errors, derived anew from the bytes of the files.

Nothing here decodes with the package: the header, the manifest and every stored form are read with numpy alone. A form
or layout that is found by discovery and not known here fails.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from aicompress.checkpoint.layouts import Layout
from aicompress.checkpoint.manifest import Entry, Manifest
from aicompress.methods import get, methods
from aicompress.methods.layerwise import LayerMethod
from aicompress.pipeline import steps
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe import Recipe
from aicompress.weights import TensorSpec, forms
from aicompress.weights.coding.streams import read_stream
from tests.weights.forms import FORMS, randn

Array = NDArray[Any]
Meta = Mapping[str, Any]
Arrays = Mapping[str, Array]  # tensors of a parameter by suffix
NUMPY = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?"}


@dataclass(frozen=True)
class Read:
    """A matrix as its tensors on disk say it.

    Attributes:
        matrix: (out, in) float64.
        numbers: how many are stored in its place.
        grids: suffixes of the tensors that hold scales and zero points.
    """

    matrix: Array
    numbers: int
    grids: frozenset[str] = frozenset()


def float8(raw: Array, exponent_bits: int) -> Array:
    """Sign, exponent, fraction; e4m3fn has no infinity, e5m2 is the upper half of a float16."""
    if exponent_bits == 5:
        return (raw.astype("<u2") << 8).view("<f2").astype(np.float64)
    sign, exponent, fraction = np.where(raw >> 7, -1.0, 1.0), raw >> 3 & 15, raw & 7
    return sign * np.where(exponent, (1 + fraction / 8) * 2.0 ** (exponent - 7.0), fraction / 8 * 2.0**-6)


def numbers(dtype: str, raw: bytes) -> Array:
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    if dtype in ("F8_E4M3", "F8_E5M2"):
        return float8(np.frombuffer(raw, "u1"), 4 if dtype == "F8_E4M3" else 5)
    return np.frombuffer(raw, NUMPY[dtype])


def codes(stream: Array, bits: int, rows: int, columns: int) -> Array:
    """Unsigned codes of little-endian bit streams, a stream of whole words for each row."""
    stored = np.unpackbits(np.ascontiguousarray(stream).view("u1").reshape(rows, -1), axis=1, bitorder="little")
    return stored[:, : columns * bits].reshape(rows, columns, bits).astype(np.int64) @ (1 << np.arange(bits))


def over_columns(groups: Array, columns: int, size: int) -> Array:
    return np.repeat(groups.astype(np.float64), size or columns, axis=1)[:, :columns]


def under(prefix: str, tensors: Arrays) -> dict[str, Array]:
    return {s.removeprefix(prefix).removeprefix("_"): t for s, t in tensors.items() if f"{s}_".startswith(f"{prefix}_")}


def prefixed(prefix: str, grids: frozenset[str]) -> frozenset[str]:
    return frozenset(f"{prefix}_{grid}" for grid in grids)


def affine(whole: Array, meta: Meta, tensors: Arrays) -> Array:
    columns, size = meta["shape"][1], meta["group_size"]
    zero = over_columns(tensors["zero"], columns, size) if "zero" in tensors else 0.0
    return (whole - zero) * over_columns(tensors["scale"], columns, size)


def int_grouped(meta: Meta, tensors: Arrays) -> Read:
    out, columns = meta["shape"]
    whole = codes(tensors[""], meta["bits"], out, columns) - (1 << meta["bits"] - 1)
    return Read(affine(whole, meta, tensors), out * columns, frozenset({"scale", "zero"}) & tensors.keys())


def codebook(meta: Meta, tensors: Arrays) -> Read:
    out, columns = meta["shape"]
    tables = tensors["tables"].astype(np.float64)
    table = np.repeat(np.arange(len(tables)), out * columns // len(tables))
    values = tables[table, codes(tensors[""], meta["bits"], out, columns).reshape(-1)].reshape(out, columns)
    if "scale" not in tensors:
        return Read(values, out * columns)
    scale = over_columns(tensors["scale"], columns, columns // tensors["scale"].shape[1])
    return Read(values * scale, out * columns, frozenset({"scale"}))


def mask(meta: Meta, tensors: Arrays) -> Array:
    out, columns = meta["shape"]
    if "pattern" not in meta:
        return np.unpackbits(tensors[""], bitorder="little")[: out * columns].astype(bool).reshape(out, columns)
    kept, size = meta["pattern"]
    ways = [[place in places for place in range(size)] for places in combinations(range(size), kept)]
    digits = {w: max((d for d in range(1, 8 * w + 1) if len(ways) ** d <= 256**w), default=0) for w in (1, 2, 4)}
    width = min((w for w in digits if digits[w]), key=lambda w: w / digits[w])
    words = tensors[""].reshape(-1, width).astype(np.int64) @ (256 ** np.arange(width))
    digit = (words[:, None] // len(ways) ** np.arange(digits[width])) % len(ways)
    ordered = np.array(ways)[digit.reshape(-1)[: out * columns // size]].reshape(out, columns)
    if "order" not in tensors:
        return ordered
    own = np.empty_like(ordered)
    own[:, tensors["order"]] = ordered
    return own


def sparse(meta: Meta, tensors: Arrays) -> Read:
    matrix = np.zeros(meta["shape"])
    matrix[mask(meta, tensors)] = tensors["values"]
    return Read(matrix, tensors["values"].size)


def sparse_codes(meta: Meta, tensors: Arrays) -> Read:
    kept = mask(meta, tensors)
    whole = np.zeros(meta["shape"])
    whole[kept] = codes(tensors["codes"], meta["bits"], 1, kept.sum())[0] - (1 << meta["bits"] - 1)
    matrix = np.where(kept, affine(whole, meta, tensors), 0.0)
    return Read(matrix, int(kept.sum()), frozenset({"scale", "zero"}) & tensors.keys())


def low_rank(meta: Meta, tensors: Arrays) -> Read:
    inner = under("in", tensors)
    left = read(meta["out"], {s: t for s, t in tensors.items() if not f"{s}_".startswith("in_")})
    right = read(meta["in"], inner)
    grids = left.grids | prefixed("in", right.grids)
    return Read(left.matrix @ right.matrix, left.numbers + right.numbers, grids)


def corrected(meta: Meta, tensors: Arrays) -> Read:
    base = read(meta["base"], {s: t for s, t in tensors.items() if not s.startswith("correction")})
    more = read(meta["correction"], under("correction", tensors))
    grids = base.grids | prefixed("correction", more.grids)
    return Read(base.matrix + more.matrix, base.numbers + more.numbers, grids)


def column_scaled(meta: Meta, tensors: Arrays) -> Read:
    inner = read(meta["inner"], {s: t for s, t in tensors.items() if s != "columns"})
    return Read(inner.matrix * tensors["columns"], inner.numbers, inner.grids)


def of_float8(meta: Meta, tensors: Arrays) -> Read:
    (out, columns), (height, width) = meta["shape"], meta["block"]
    values = float8(tensors[""], 4 if "e4m3" in meta["dtype"] else 5).reshape(out, columns)
    rows = np.repeat(tensors["scale"].astype(np.float64), height or out, axis=0)[:out]
    return Read(values * over_columns(rows, columns, width), values.size, frozenset({"scale"}))


def convolutions(meta: Meta, tensors: Arrays) -> Read:
    """Each kernel slides over what the one before gives: places add up, channels are summed over."""
    inner = {name: under(name, tensors) for name in ("in", "core")}
    last = {s: t for s, t in tensors.items() if s.partition("_")[0] not in inner}
    parts = [read(meta[name], inner.get(name, last)) for name in ("in", "core", "out") if name in meta]
    whole, grids = np.ones((1, 1, 1, 1)), frozenset[str]()
    for number, (part, size) in enumerate(zip(parts, meta["kernels"], strict=True)):
        kernel = part.matrix.reshape(len(part.matrix), -1, *size)
        if number == 0:
            whole = kernel
            continue
        (out, _, rows, columns), (_, channels, height, width) = kernel.shape, whole.shape
        wider = np.zeros((out, channels, rows + height - 1, columns + width - 1))
        for row, column in np.ndindex(rows, columns):
            sides = np.s_[row : row + height, column : column + width]
            wider[:, :, *sides] += np.tensordot(kernel[:, :, row, column], whole, 1)
        whole = wider
    for name, part in zip([name for name in ("in", "core", "out") if name in meta], parts, strict=True):
        grids |= part.grids if name == "out" else prefixed(name, part.grids)
    return Read(whole.reshape(len(whole), -1), sum(part.numbers for part in parts), grids)


def base_delta(meta: Meta, tensors: Arrays) -> Read:
    delta = low_rank(meta, {s: t for s, t in tensors.items() if not f"{s}_".startswith("base_")})
    base = read(meta["base"], under("base", tensors))
    return Read(base.matrix + delta.matrix, base.numbers + delta.numbers, delta.grids | prefixed("base", base.grids))


def submatrix(meta: Meta, tensors: Arrays) -> Read:
    block = read(meta["block"], {s: t for s, t in tensors.items() if s not in ("rows", "columns")})
    matrix = np.zeros(meta["shape"])
    rows, columns = (tensors.get(s, np.arange(n)) for s, n in zip(("rows", "columns"), meta["shape"], strict=True))
    matrix[np.ix_(rows, columns)] = block.matrix
    return Read(matrix, block.numbers, block.grids)


def tied(meta: Meta, tensors: Arrays) -> Read:
    source = under("source", tensors)
    if meta["source"]["form"] == "dense":
        source[""] = source[""].T if meta.get("transposed") else source[""].reshape(len(source[""]), -1)
    own = read(meta["source"], source)
    return Read(own.matrix, own.numbers, prefixed("source", own.grids))


def trellis(meta: Meta, tensors: Arrays) -> Read:
    """ISO/IEC 15938-17: a state and the parity of a code give the next state, odd ones the second quantizer."""
    out, columns = meta["shape"]
    whole = codes(tensors[""], 8, out, columns) - 128
    following = np.array([[0, 2], [7, 5], [1, 3], [6, 4], [2, 0], [5, 7], [3, 1], [4, 6]])
    levels, state = np.zeros((out, columns)), np.zeros(columns, dtype=np.int64)
    for row, code in enumerate(whole):
        if row % 256 == 0:
            state[:] = 0
        levels[row] = 2 * code - (state & 1) * np.sign(code)
        state = following[state, code & 1]
    return Read(levels * tensors["scale"].astype(np.float64), out * columns, frozenset({"scale"}))


def entropy(meta: Meta, tensors: Arrays) -> Read:
    """Streams are decoded by the package, whose coder has tests of its own; what they hold is read here."""
    fixed = dict(tensors)
    for suffix, (kind, rows, columns) in meta["coded"].items():
        symbols = read_stream(torch.from_numpy(tensors[suffix].copy()), rows, columns).numpy()
        if kind == "mask":
            fixed[suffix] = np.packbits(symbols.reshape(-1), bitorder="little")
        elif isinstance(kind, int):
            bits = np.unpackbits(symbols[..., None], axis=2, count=kind, bitorder="little").reshape(rows, -1)
            fixed[suffix] = np.packbits(np.pad(bits, ((0, 0), (0, -bits.shape[1] % 32))), axis=1, bitorder="little")
        else:
            fixed[suffix] = symbols.view("i1") if kind == "int8" else symbols.reshape(-1)
    return read(meta["inner"], fixed)


def per_expert(meta: Meta, tensors: Arrays) -> Read:
    own = [{s: np.split(t, meta["count"])[n] for s, t in tensors.items()} for n in range(meta["count"])]
    parts = [read(meta["each"], each) for each in own]
    matrices = [part.matrix.T if meta.get("transposed") else part.matrix for part in parts]
    return Read(np.concatenate(matrices), sum(part.numbers for part in parts), parts[0].grids)


READERS: dict[str, Callable[[Meta, Arrays], Read]] = {
    "dense": lambda meta, tensors: Read(tensors[""].astype(np.float64), tensors[""].size),
    "low_rank": low_rank,
    "sparse": sparse,
    "sparse_codes": sparse_codes,
    "int_grouped": int_grouped,
    "codebook": codebook,
    "column_scaled": column_scaled,
    "corrected": corrected,
    "float8": of_float8,
    "convolutions": convolutions,
    "base_delta": base_delta,
    "submatrix": submatrix,
    "tied": tied,
    "trellis": trellis,
    "entropy": entropy,
    "per_expert": per_expert,
}


def read(meta: Meta, tensors: Arrays) -> Read:
    return READERS[meta["form"]](meta, tensors)


@dataclass
class File:
    """A checkpoint's numbers, from its bytes.

    Attributes:
        nbytes, header: of the weight files, and of their headers.
        parameters: each as its tensors say it.
        sizes: bytes of each parameter, and of its scales and zero points.
    """

    nbytes: int = 0
    header: int = 0
    parameters: dict[str, Read] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path) -> File:
        file = cls()
        tensors: dict[str, tuple[Array, int]] = {}
        metadata: dict[str, str] = {}
        for weights in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
            raw = weights.read_bytes()
            start = 8 + struct.unpack("<Q", raw[:8])[0]
            header = json.loads(raw[8:start])
            metadata |= header.pop("__metadata__", {})
            file.nbytes, file.header = file.nbytes + len(raw), file.header + start
            for name, told in header.items():
                begin, end = told["data_offsets"]
                values = numbers(told["dtype"], raw[start + begin : start + end]).reshape(told["shape"])
                tensors[name] = (values, end - begin)
        settings = (
            json.loads((path / "config.json").read_text()).get("quantization_config", {}) if path.is_dir() else {}
        )
        if "config_groups" in settings:
            file._packed(tensors, settings["config_groups"]["group_0"]["weights"])
        described = settings if "entries" in settings else json.loads(metadata.get("aicompress", "{}"))
        stored = dict(tensors)
        for name, entry in described.get("entries", {}).items():
            lent = {suffix: (stored[disk][0], 0) for suffix, disk in entry.get("shared", {}).items()}
            kept = [suffix for suffix in entry["tensors"] if suffix not in lent]
            own = {suffix: tensors.pop(f"{name}_{suffix}" if suffix else name) for suffix in kept} | lent
            parameter = read(entry["meta"], {suffix: values for suffix, (values, _) in own.items()})
            once = parameter.numbers - sum(
                values.size for values, _ in lent.values()
            )  # plain parts count at their owner
            file._add(name, replace(parameter, numbers=once), own)
        for name, (values, size) in tensors.items():
            file._add(name, Read(values.reshape(len(values), -1).astype(np.float64), values.size), {"": (values, size)})
        return file

    def _add(self, name: str, parameter: Read, own: Mapping[str, tuple[Array, int]]) -> None:
        grids = sum(size for suffix, (_, size) in own.items() if suffix in parameter.grids)
        self.parameters[name], self.sizes[name] = parameter, (sum(size for _, size in own.values()), grids)

    def _packed(self, tensors: dict[str, tuple[Array, int]], weights: Meta) -> None:
        """Take the integer weights of compressed-tensors out of a file's tensors."""
        bits = weights["num_bits"]
        for scales in [name for name in tensors if name.endswith(".weight_scale")]:
            module = scales.removesuffix("_scale")
            own = {
                s: tensors.pop(module + s)
                for s in ("", "_packed", "_scale", "_shape", "_zero_point")
                if module + s in tensors
            }
            arrays = {suffix: values for suffix, (values, _) in own.items()}
            out, columns = arrays.get("_shape", np.array(arrays.get("", np.empty(0)).shape)).tolist()
            whole = arrays[""] if "" in arrays else codes(arrays["_packed"], bits, out, columns) - (1 << bits - 1)
            grid = {"scale": arrays["_scale"]}
            if "_zero_point" in arrays:
                rows = codes(arrays["_zero_point"].T, bits, arrays["_zero_point"].shape[1], out)
                grid["zero"] = rows.T - (1 << bits - 1)
            meta = {"shape": (out, columns), "group_size": weights["group_size"]}
            grids = frozenset({"_scale", "_zero_point"})
            self._add(module, Read(affine(whole, meta, grid), out * columns, grids), own)


def run(source: Path, out: Path, command: str, include: tuple[str, ...] = (), **method: Any) -> dict[str, Any]:
    """Run a step; its report as JSON."""
    select = {"include": include, "kinds": ("linear", "conv", "embedding")} if include else {}
    config = get(command, method["name"]).config(**method)
    recipe = Recipe(version=1, method=config, select=select, report={"html": False})
    plan = steps.make_plan(source, Destination(out), recipe, command)
    printed = {row.name: row.bytes_after for row in plan.summary().rows}
    report: dict[str, Any] = json.loads(steps.run(plan, Options(latency="off")).to_json())
    assert printed == {row["name"]: row["bytes_after"] for row in report["layers"] if row["method"] != "-"}
    return report


def check(report: dict[str, Any], before: File, after: File, rewritten: bool = False) -> None:
    """Every size, count and error of a report is what the files say; errors unless weights were rescaled or rotated."""
    for told, file, column in ((report["before"], before, "bytes_before"), (report["after"], after, "bytes_after")):
        assert told["weight_bytes"] == file.nbytes == sum(told["by_kind"].values())
        assert told["by_kind"]["header"] == file.header
        assert told["by_kind"].get("scale", 0) == sum(grids for _, grids in file.sizes.values())
        assert told["parameters"] == sum(each.numbers for each in file.parameters.values())
        assert told["weights"] == sum(each.matrix.size for each in file.parameters.values())
        assert told["bits_per_parameter"] == 8 * file.nbytes / told["parameters"]
        rows: dict[str, int] = {}
        for row in report["layers"]:
            rows[parameter(row["name"], file)] = rows.get(parameter(row["name"], file), 0) + row[column]
        assert rows == {name: file.sizes[name][0] for name in rows}
        assert sum(rows.values()) + told["by_kind"].get("other", 0) + file.header == file.nbytes
    weights = sum(each.matrix.size for each in before.parameters.values())
    assert report["size"] == {
        "ratio": after.nbytes / before.nbytes,
        "bits_per_original_weight": 8 * after.nbytes / weights,
    }
    for row in report["layers"]:
        name = parameter(row["name"], before)
        if row["rel_error"] is not None and name == f"{row['name']}.weight" and not rewritten:
            original, stored = before.parameters[name].matrix, after.parameters[name].matrix
            error = np.linalg.norm(stored - original) / (np.linalg.norm(original) or 1.0)
            assert row["rel_error"] == pytest.approx(error, rel=1e-3, abs=1e-6), row["name"]
            if "sparsity" in row["detail"]:
                zeros = 1 - np.count_nonzero(stored) / stored.size
                assert row["detail"]["sparsity"] == pytest.approx(zeros, abs=1 / stored.size)


def parameter(layer: str, file: File) -> str:
    """The parameter of a layer, or of a factor of one."""
    whole = f"{layer}.weight"
    return whole if whole in file.parameters else f"{layer.rsplit('.', 2)[0]}.weight"


def test_every_form_and_layout_is_read() -> None:
    assert READERS.keys() == forms().keys(), "a stored form without a reader here"
    assert set(get_args(Layout)) == {"plain", "native", "compressed-tensors"}, "a layout without a reader here"


def test_of_every_form_as_an_input(tmp_path: Path) -> None:
    """All forms are decoded here and by the step alike: it rounds some of them, and leaves others as they are."""
    entries: dict[str, Entry] = {}
    tensors = {"norm.weight": randn(12), "fc.bias": randn(6)}
    unlike = {str((w.form, w.meta().keys(), w.meta().get("bits"), w.tensors().keys())): w for w in FORMS.values()}
    for number, weight in enumerate(unlike.values()):
        name = f"{'kept' if number % 3 == 0 else 'fc'}{number}.weight"
        stored = weight.tensors()
        tensors |= {f"{name}_{s}" if s else name: t.contiguous() for s, t in stored.items()}
        if weight.form != "dense":
            entries[name] = Entry(TensorSpec(torch.float32, weight.shape), False, weight.meta(), tuple(stored))
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, source, metadata={"aicompress": Manifest(entries).to_text()})
    report = run(source, out, "quantize", ("fc*",), name="rtn", bits=8, granularity="channel")
    check(report, File.of(source), File.of(out))


@functools.cache
def plain() -> dict[str, torch.Tensor]:
    return {
        "embed.weight": randn(40, 32), "conv.weight": randn(8, 4, 3, 3), "norm.weight": randn(32),
        "up.weight": randn(64, 32).bfloat16(), "up.bias": randn(64), "down.weight": randn(32, 48),
    }  # fmt: skip


DATA_FREE = [
    (command, method.name)
    for command in ("factorize", "quantize", "prune")
    for method in methods(command).values()
    if isinstance(method, LayerMethod) and not method.needs
]


@pytest.mark.parametrize(("command", "name"), DATA_FREE)
def test_of_every_method_that_needs_no_data(command: str, name: str, tmp_path: Path) -> None:
    method = get(command, name)
    assert isinstance(method, LayerMethod)
    layers = ("up", "down", "embed") if method.made_for == LayerMethod.made_for else ("conv",)
    config = method.config
    fields: list[dict[str, Any]] = list(config.model_config.get("json_schema_extra", {}).get("examples", []))  # type: ignore[union-attr]
    source = tmp_path / "in.safetensors"
    save_file(plain(), source)
    for number, example in enumerate(fields[:2]):
        out = tmp_path / f"{number}.safetensors"
        check(run(source, out, command, layers, name=name, **example), File.of(source), File.of(out))


@pytest.mark.parametrize("symmetric", [True, False])
def test_of_compressed_tensors(symmetric: bool, tiny_llama: Path, tmp_path: Path) -> None:
    """Zero points are packed on disk, and shapes stored; a step into the native layout stores what it leaves anew."""
    report = run(tiny_llama, tmp_path / "ct", "quantize", name="rtn", bits=4, group_size=32, symmetric=symmetric)
    check(report, File.of(tiny_llama), File.of(tmp_path / "ct"))
    if not symmetric:
        report = run(tmp_path / "ct", tmp_path / "native", "quantize", ("*.up_proj",), name="nf4")
        check(report, File.of(tmp_path / "ct"), File.of(tmp_path / "native"))
