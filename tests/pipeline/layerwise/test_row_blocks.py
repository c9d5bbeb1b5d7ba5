"""A parameter done in blocks of rows is, to the byte, what it is when done as a whole."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aicompress.checkpoint import Checkpoint, files, reader
from aicompress.checkpoint.checkpoint_headers import CheckpointHeaders
from aicompress.checkpoint.files import read_tensor
from aicompress.checkpoint.header import TensorRef
from aicompress.errors import CheckpointError
from aicompress.methods import factors as products
from aicompress.methods.quantize import rtn
from aicompress.methods.quantize.grid import compiled
from aicompress.pipeline import export
from aicompress.pipeline.layerwise import planner, work
from aicompress.pipeline.layerwise import run as layerwise
from aicompress.pipeline.layerwise.rows import reading, writing
from aicompress.pipeline.step import blocks
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.verify import verify
from aicompress.recipe import load
from aicompress.recipe.made import ExportRecipe
from aicompress.report.model import Report
from aicompress.weights import (
    ColumnScaled,
    Dense,
    IntGrouped,
    LowRank,
    Sparse,
    SparseCodes,
    Submatrix,
    TensorSpec,
    Trellis,
    Weight,
    entropy_coded,
)
from aicompress.weights.coding import writing as coding
from aicompress.weights.grouping import Grouping
from tests import foreign
from tests.weights.forms import write_form

METHODS = (
    ("quantize/rtn-w4", "method.group_size=32"),
    ("quantize/rtn-w4-asymmetric", "method.group_size=32"),  # zero points of 32 rows share words
    ("quantize/rtn-w3", "method.group_size=32"),
    ("quantize/rtn-w8",),
    ("quantize/rtn-w8", "method.granularity=tensor"),
    ("quantize/rtn-w4-asymmetric", "method.granularity=tensor", "method.range=minmax"),
    ("quantize/rtn-w4-asymmetric", "method.granularity=tensor", "method.range=mse"),
    ("quantize/rtn-w4", "method.bits=range", "method.max_error=0.3", "method.granularity=tensor"),
    ("quantize/w8a8",),
    ("quantize/rtn-w8-embeddings",),
    ("quantize/hqq-w4", "method.group_size=32"),
    ("quantize/nf4", "method.group_size=32"),
    ("quantize/kmeans-w4", "method.iterations=3"),
    ("quantize/kmeans-w4", "method.iterations=3", "method.granularity=tensor"),
    ("prune/magnitude-50",),
    ("prune/magnitude-90-sparse",),  # each block of rows keeps another number
    ("prune/magnitude-50", "method.scope=row", "method.store=sparse"),
    ("prune/magnitude-50", "method.block=4x2", "method.store=auto"),
    ("prune/magnitude-2-4", "method.store=dense"),
    ("prune/magnitude-2-4",),
    ("prune/lamp-50", "method.store=sparse"),
    ("prune/magnitude-global",),
    (
        "quantize/sinq-w4",
        "method.group_size=32",
        "method.symmetric=false",
        "method.iterations=2",
        "method.range=minmax",
    ),
    ("quantize/sinq-w4", "method.granularity=tensor", "method.iterations=2"),
    ("quantize/sinq-w4", "method.granularity=tensor", "method.iterations=2", "method.symmetric=false"),
)

COMPILED = (
    ("quantize/rtn-w4-asymmetric", "method.group_size=32", "method.range=minmax"),
    ("quantize/rtn-w8-embeddings",),
    ("quantize/w8a8",),
)


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


FEW = "select.include=['model.layers.0.*', 'model.embed_tokens']"  # every shape of the model


def run(source: Path, out: Path, recipe: str, *overrides: str) -> Report:
    command = recipe.partition("/")[0]
    made = planner.make_plan(
        source, Destination(out), load(recipe, command, ("report.html=false", *overrides)), command
    )
    return layerwise.run(made, Options(latency="off"))


def both(monkeypatch: pytest.MonkeyPatch, source: Path, recipe: str, *overrides: str) -> Iterator[tuple[Report, Path]]:
    """The step in blocks of rows, and then in whole tensors: its report and output, beside the input."""
    monkeypatch.setattr(reading, "BLOCK", 1)
    for way, divisible in (("blocks", reading.divisible), ("whole", lambda *_: False)):
        monkeypatch.setattr(reading, "divisible", divisible)
        out = source.with_name(f"{way}{source.suffix}")
        yield run(source, out, recipe, *overrides), out


def counts_of_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Into how many blocks tensors are divided from now on."""
    of_shape, counts = reading.blocks, list[int]()
    monkeypatch.setattr(reading, "blocks", lambda *given: counts.append(len(of_shape(*given))) or of_shape(*given))
    return counts


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("recipe", METHODS, ids=" ".join)
def test_blocks_give_the_bytes_of_the_whole(
    tmp_path: Path, tiny_llama_bf16: Path, monkeypatch: pytest.MonkeyPatch, recipe: tuple[str, ...]
) -> None:
    monkeypatch.setattr(reading, "BLOCK", 1)  # blocks of 32 rows
    read, lengths = reader.read_part, []

    def noting(ref: TensorRef, name: str, part: slice, axis: int) -> torch.Tensor:
        lengths.append(part.stop - part.start)
        return read(ref, name, part, axis)

    monkeypatch.setattr(reader, "read_part", noting)
    monkeypatch.setattr(
        reader, "read_tensor", lambda ref, name: lengths.append(ref.spec.shape[0]) or read_tensor(ref, name)
    )
    blocks = run(tiny_llama_bf16, tmp_path / "blocks", *recipe, FEW)
    assert max(lengths) <= 128  # rows whose masks share bytes; nobody reads the 256 of the largest tensor at once
    monkeypatch.setattr(reading, "divisible", lambda *_: False)
    whole = run(tiny_llama_bf16, tmp_path / "whole", *recipe, FEW)
    assert weights(tmp_path / "blocks") == weights(tmp_path / "whole")
    assert [row.rel_error for row in blocks.layers] == pytest.approx([row.rel_error for row in whole.layers], rel=1e-6)
    assert [row.detail for row in blocks.layers] == [row.detail for row in whole.layers]
    assert torch.get_num_threads() == 2


COMPRESSED: dict[str, tuple[foreign.Encode, dict[str, Any] | None]] = {
    "gptq": (foreign.gptq(symmetric=False), {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}),
    "gptq, act-order": (foreign.gptq(symmetric=False, order=True), {"quant_method": "gptq", "desc_act": True}),
    "awq": (foreign.awq(), {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
    "nf4, nested": (foreign.nf4(nested=True), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "fp8": (foreign.fp8(), {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "mxfp4": (foreign.mxfp4, {"quant_method": "compressed-tensors", "config_groups": {}}),
}
RECIPES = (("quantize/rtn-w4-asymmetric", "method.group_size=32"), ("prune/magnitude-50",))


@pytest.mark.parametrize("case", COMPRESSED)
def test_blocks_of_compressed_weights_give_the_bytes_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """One that is compressed anew and one that is copied, of another tool's and then of ours, a few rows at a time."""
    encode, settings = COMPRESSED[case]
    source, (one, other) = tmp_path / "in", (encode(torch.randn(552, 64) / 8) for _ in range(2))
    both = {f".{name}{s}": t for name, each in (("a", one), ("b", other)) for s, t in each.tensors.items()}
    foreign.write(source, foreign.Encoded(both, one.dense), settings)
    read, whole = files._read, list[str]()

    def noting(ref: TensorRef, begins: Any, spec: TensorSpec, name: str) -> torch.Tensor:
        whole.extend([name] if spec == ref.spec and spec.nbytes > 4096 else [])
        return read(ref, begins, spec, name)

    for number, (folder, recipe) in enumerate([*((source, each) for each in RECIPES), (tmp_path / "0", RECIPES[1])]):
        with monkeypatch.context() as patched:
            patched.setattr(reading, "BLOCK", 1)
            patched.setattr(files, "_read", noting)
            run(folder, tmp_path / f"{number}", *recipe, "select.include=['m.a']")
        assert not whole
        with monkeypatch.context() as patched:
            patched.setattr(reading, "divisible", lambda *_: False)
            run(folder, tmp_path / f"whole{number}", *recipe, "select.include=['m.a']")
        assert weights(tmp_path / f"{number}") == weights(tmp_path / f"whole{number}"), recipe


@functools.cache
def stored_forms() -> dict[str, Weight]:
    """Weights whose rows do not lie in proportion, or become streams; each has tensors of more than 16 kB."""
    draw = torch.Generator().manual_seed(0)
    matrix, mask = torch.randn(2208, 60, generator=draw), torch.rand(2208, 60, generator=draw) < 0.4
    codes = IntGrouped(
        (2 * matrix).round().clamp(-8, 7).to(torch.int8), torch.rand(2208, 3, generator=draw), None, 4, 20
    )
    order = torch.randperm(60, generator=draw)
    of_groups = torch.rand(2208, 15, 4, generator=draw).argsort(2).lt(2).reshape(2208, 60)[:, order.argsort()]
    return {
        "mask": Sparse.of(matrix, mask),
        "N:M mask of permuted columns": Sparse.of(matrix, of_groups, Grouping(2, 4, order.short())),
        "codes under a mask": SparseCodes.of(codes, mask),
        "column factors": ColumnScaled(SparseCodes.of(codes, mask), torch.rand(60, generator=draw)),
        "some rows": Submatrix(Dense(matrix[:900]), (2208, 60), torch.arange(10, 910, dtype=torch.int32)),
        "codes": codes,
        "trellis": Trellis((3 * matrix).round().to(torch.int8), torch.rand(2208, 1, generator=draw)),
        "factors": LowRank(codes, Dense(torch.randn(60, 40, generator=draw))),
    }


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("form", "coded"),
    [(form, coded) for form in stored_forms() for coded in (False, True) if not coded or form[:3] != "N:M"],
)
def test_blocks_of_stored_forms_give_the_bytes_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, coded: bool
) -> None:
    """One that is compressed anew, where it can be, one that is copied, and all of them decoded."""
    weight, source = stored_forms()[form], tmp_path / "in.safetensors"
    if coded and form != "some rows":
        monkeypatch.setattr(coding, "SMALL", 0)  # as of large ones
        monkeypatch.setattr(coding, "TINY", 0)
        weight = entropy_coded(weight)
    write_form(source, weight, weight.tensors(), ("a", "b"))
    read, whole = files._read, list[str]()

    def noting(ref: TensorRef, begins: Any, spec: TensorSpec, name: str) -> torch.Tensor:
        whole.extend([name] if spec == ref.spec and spec.nbytes > 16000 else [])
        return read(ref, begins, spec, name)

    def written(name: str, recipe: str, *overrides: str) -> bytes:
        out = tmp_path / f"{name}-{recipe.replace('/', '-')}.safetensors"
        if recipe == "export":
            export.run(
                export.make_plan(source, Destination(out), ExportRecipe(method={"name": "dense"})),
                Options(latency="off"),
            )
        else:
            run(source, out, recipe, "select.include=['a']", *overrides)
        return out.read_bytes()

    pruned = ("prune/magnitude-90-sparse",), ("prune/magnitude-50", "method.store=dense")
    recipes = (("export",), ("quantize/rtn-w3", "method.group_size=20"), *(pruned if "mask" in form else ()))
    for recipe in (*recipes, *(pruned[:1] if form == "factors" else ())):
        with monkeypatch.context() as patched:
            patched.setattr(reading, "BLOCK", 8000)
            patched.setattr(blocks, "BLOCK", 6000)
            patched.setattr(files, "_read", noting)
            in_blocks = written("blocks", *recipe)
        assert not whole or coded or form == "factors"  # streams are small, and so are inner factors
        with monkeypatch.context() as patched:
            patched.setattr(CheckpointHeaders, "row_multiple", lambda *_: 0)
            assert in_blocks == written("whole", *recipe)


@pytest.mark.parametrize("recipe", [("quantize/rtn-w3", "method.bits=2"), ("prune/magnitude-2-4",)], ids=" ".join)
def test_blocks_of_rows_have_the_form_that_was_planned_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: tuple[str, ...]
) -> None:
    """Of some of them the other form is smaller: of codes, or of those under a mask."""
    shares = torch.tensor([0.75, 0.35]).repeat_interleave(320)[:, None]
    weight: Weight = Sparse.of(torch.randn(640, 64), torch.rand(640, 64) < shares)
    if recipe[0].startswith("prune"):
        weight = IntGrouped(torch.randint(-8, 8, (640, 64), dtype=torch.int8), torch.ones(640, 1), None, 4)
    write_form(tmp_path / "in.safetensors", weight, weight.tensors())
    blocks, whole = (out.read_bytes() for _, out in both(monkeypatch, tmp_path / "in.safetensors", *recipe))
    assert blocks == whole


@pytest.mark.parametrize(
    "recipe",
    [
        ("quantize/rtn-w4-asymmetric", "method.group_size=16"),
        ("quantize/nf4", "method.group_size=16"),
        ("prune/magnitude-90-sparse",),
        ("prune/magnitude-global",),
    ],
    ids=" ".join,
)
def test_blocks_of_transposed_layers_give_the_bytes_of_the_whole(
    tmp_path: Path, tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch, recipe: tuple[str, ...]
) -> None:
    """A block of rows is one of columns of the file's tensor, and is written as such where it stays plain."""
    read, whole = files._read, list[str]()

    def noting(ref: TensorRef, begins: Any, spec: TensorSpec, name: str) -> torch.Tensor:
        whole.extend([name] if spec == ref.spec and spec.nbytes > 8192 else [])
        return read(ref, begins, spec, name)

    with monkeypatch.context() as patched:
        patched.setattr(reading, "MOST", 1)  # 32 columns
        patched.setattr(reading, "BLOCK", 1)
        patched.setattr(files, "_read", noting)
        run(tiny_gpt2, tmp_path / "blocks", *recipe)
    assert not whole
    monkeypatch.setattr(reading, "divisible", lambda *_: False)
    run(tiny_gpt2, tmp_path / "whole", *recipe)
    assert weights(tmp_path / "blocks") == weights(tmp_path / "whole")


@pytest.mark.parametrize("change", ["method.threshold=0", "method.value=mean"])
def test_layers_that_are_tied_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """The same rows of all of them at a time, compared and written; a convolution among them, and one like no other."""
    drawn = torch.randn(5, 300, 8, 3)
    near = drawn[0] * (1.0 if change == "method.threshold=0" else 1.04)
    tensors = {"a.weight": drawn[0], "b.weight": drawn[1], "c.weight": near, "d.weight": drawn[2].reshape(300, 24)}
    tensors |= {"e.weight": tensors["d.weight"].clone(), "f.weight": drawn[0].clone()}
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, tmp_path / "in.safetensors")
    shapes, written, rows = counts_of_blocks(monkeypatch), list[bytes](), list[Any]()
    for report, out in both(monkeypatch, tmp_path / "in.safetensors", "factorize/tie", "method.threshold=0.05", change):
        written.append(out.read_bytes())
        rows.append([(row.name, row.form, row.note, round(row.rel_error, 6)) for row in report.layers])
    assert written[0] == written[1]
    assert rows[0] == rows[1]
    assert min(shapes) > 2
    assert [form for _, form, *_ in rows[0]] == ["dense", "dense", "tied", "dense", "tied", "tied"]


def factors(path: Path) -> dict[str, torch.Tensor]:
    """What a file's factors, or other described weights, give."""
    made = Checkpoint.open(path)
    return {name: made.weight(name).dense() for name in made.manifest.entries}


@pytest.mark.parametrize(
    "recipe",
    [
        ("prune/magnitude-90-sparse",),  # of all experts as one matrix
        ("prune/lamp-50", "method.store=sparse"),  # one by one, as these are
        ("quantize/sinq-w4", "method.granularity=tensor", "method.iterations=1", "method.range=minmax"),
    ],
    ids=" ".join,
)
def test_experts_that_are_written_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: tuple[str, ...]
) -> None:
    """Plain ones, and what is made of them in turn."""
    source = tmp_path / "in.safetensors"
    save_file({"experts.down_proj": torch.randn(3, 32, 40), "fc.weight": torch.randn(8, 40)}, source)
    monkeypatch.setattr(reading, "BLOCK", 1)
    for turn in range(2):
        blocks, whole = tmp_path / f"{turn}-blocks.safetensors", tmp_path / f"{turn}-whole.safetensors"
        in_blocks = run(source, blocks, *recipe)
        with monkeypatch.context() as patched:
            patched.setattr(reading, "divisible", lambda *_: False)
            patched.setattr(work.Work, "_write_experts", lambda *_: None)
            as_whole = run(source, whole, *recipe)
        assert blocks.read_bytes() == whole.read_bytes()
        for one, other in zip(in_blocks.layers, as_whole.layers, strict=True):
            assert (one.form, one.detail, one.bytes_after) == (other.form, other.detail, other.bytes_after)
            assert one.rel_error == pytest.approx(other.rel_error, rel=1e-6)
        source = blocks


@pytest.mark.parametrize("size", [("method.keep=0.4",), ("method.keep=null", "method.energy=0.5")], ids="".join)
def test_factors_of_blocks_are_those_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[str, ...]
) -> None:
    """Of tall and wide layers, a convolution, and one that stays dense; the report tells what rounding would lose."""
    shapes = {"tall": (160, 64), "wide": (70, 256), "conv": (96, 5, 3, 3), "dense": (40, 1)}
    save_file({f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}, tmp_path / "in.safetensors")
    rows, found = [], []
    for report, out in both(monkeypatch, tmp_path / "in.safetensors", "factorize/svd-keep", *size):
        rows.append(report.layers)
        found.append(factors(out))
    assert found[0].keys() == {"tall.weight", "wide.weight", "conv.weight"}
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(*rows, strict=True):
        assert (ours.name, ours.detail, ours.bytes_after) == (theirs.name, theirs.detail, theirs.bytes_after)
        assert ours.rel_error == pytest.approx(theirs.rel_error, rel=1e-5)
        assert ours.note == theirs.note
    assert "less would be lost" in rows[0][0].note


@pytest.mark.parametrize(
    ("recipe", "size"),
    [
        ("stack", ()),  # queries have more blocks than keys
        ("stack", ("method.keep=null", "method.energy=0.5")),
        ("stack", ("method.relative=false", "method.keep=null", "method.rank=20")),
        ("stack", ("method.keep=null", "method.rank=60")),  # stays dense
        ("shared-basis", ("select.exclude=['*.layers.1.mlp.*']",)),  # of those of block 0 each is alone
        ("base-delta", ()),
        ("base-delta", ("method.blocks=3", "method.rounds=1", "method.relative=false")),
    ],
    ids=str,
)
def test_groups_in_blocks_are_those_of_the_whole(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, size: tuple[str, ...]
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "in")
    rows, found, shapes = [], [], counts_of_blocks(monkeypatch)
    few = ("method.whiten=false", *size)
    for report, out in both(monkeypatch, tmp_path / "in", f"factorize/{recipe}-keep", *few):
        assert verify(out).problems == ()
        rows.append(report.layers)
        found.append(factors(out))
    assert max(shapes) > 2
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(*rows, strict=True):
        assert (ours.name, ours.detail, ours.bytes_after) == (theirs.name, theirs.detail, theirs.bytes_after)
        assert ours.rel_error == pytest.approx(theirs.rel_error, rel=1e-5)
        assert ours.note == theirs.note


@pytest.mark.parametrize("bits", ["4", "8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_factors_in_blocks_are_rounded_as_those_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bits: str
) -> None:
    """The outer one in blocks of 32 rows; R is of all rows at once, which gives the same rotation."""
    draw, scales = torch.Generator().manual_seed(0), torch.logspace(0, -2, 48)
    out, inner = (torch.randn(rows, 48, generator=draw) * scales for rows in (700, 128))
    weight = LowRank(Dense(out.to(dtype)), Dense(inner.t().to(dtype).contiguous()))
    write_form(tmp_path / "in.safetensors", weight, weight.tensors())
    monkeypatch.setattr(reading, "BLOCK", 1)
    monkeypatch.setattr(products, "ROWS", 100)
    read, heights, pair = reading.read, [], reading.pair
    monkeypatch.setattr(reading, "read", lambda *given: heights.append(given[2].stop - given[2].start) or read(*given))
    edits, rows, lost = ("method.group_size=16", f"method.bits={bits}"), [], []
    for way in (pair, lambda *_: None):
        monkeypatch.setattr(reading, "pair", way)
        report = run(tmp_path / "in.safetensors", tmp_path / f"{len(rows)}.safetensors", "quantize/rtn-w4", *edits)
        rows.append(report.layers)
        got = factors(tmp_path / f"{len(lost)}.safetensors")["fc.weight"]
        lost.append(float((got - weight.dense()).norm()))
    assert max(heights) == 48  # all of the inner one
    assert lost[0] == pytest.approx(lost[1], rel=1e-3)
    for ours, theirs in zip(*rows, strict=True):
        assert (ours.name, ours.detail, ours.bytes_after) == (theirs.name, theirs.detail, theirs.bytes_after)
        assert ours.rel_error == pytest.approx(theirs.rel_error, rel=0.1)  # of what is fitted, which bfloat16 rounds
        assert ours.note == theirs.note


def test_two_convolutions_of_blocks_are_those_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"tall": (160, 4, 3, 3), "wide": (70, 16, 3, 5), "dense": (40, 2, 1, 2)}
    save_file({f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}, tmp_path / "in.safetensors")
    rows, found, recipe = [], [], ("factorize/spatial-keep", "method.keep=null", "method.energy=0.7")
    for report, out in both(monkeypatch, tmp_path / "in.safetensors", *recipe):
        rows.append([(row.name, row.detail, row.bytes_after, round(row.rel_error, 4)) for row in report.layers])
        found.append(factors(out))
    assert rows[0] == rows[1]
    assert found[0].keys() == {"tall.weight", "wide.weight"}
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantizer", ["uniform", "trellis"])
def test_codes_of_a_target_that_are_counted_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantizer: str
) -> None:
    """They are as near the target, and as near the weight, as those of a layer that is held."""
    scales = torch.linspace(0.5, 2, 128)
    save_file(
        {"a.weight": scales * torch.randn(1536, 128), "b.weight": torch.zeros(600, 128)}, tmp_path / "in.safetensors"
    )
    recipe, found = ("quantize/rdo-3bpw", f"method.quantizer={quantizer}"), []
    for report, _ in both(monkeypatch, tmp_path / "in.safetensors", *recipe):
        found.append(report.layers[0])
        assert 8 * (found[-1].bytes_after or 0) / (1536 * 128) == pytest.approx(3, rel=0.01)
        assert report.layers[1].rel_error == 0
    assert found[0].rel_error == pytest.approx(found[1].rel_error, rel=0.01)


@pytest.mark.parametrize(
    "edits",
    [
        ("method.pattern='2:4'",),
        ("method.pattern='3:8'",),
        ("method.pattern='2:2'",),
        ("method.permutation=2",),  # the order of the inputs is that of all rows
        ("method.permutation=2", "method.store=dense"),
    ],
    ids=" ".join,
)
def test_words_of_a_mask_are_whole_in_every_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edits: tuple[str, ...]
) -> None:
    tensors = {"a.weight": torch.randn(300, 40), "b.weight": torch.randn(517, 8), "c.weight": torch.randn(33, 8)}
    save_file(tensors, tmp_path / "in.safetensors")
    shapes = counts_of_blocks(monkeypatch)
    made = both(monkeypatch, tmp_path / "in.safetensors", "prune/magnitude-2-4", *edits)
    blocks, whole = (out.read_bytes() for _, out in made)
    assert max(shapes) > 2
    assert blocks == whole


@pytest.mark.parametrize("recipe", COMPILED, ids=lambda recipe: recipe[0])
def test_compiled_passes_give_the_bytes_of_the_whole(
    tmp_path: Path, tiny_llama_bf16: Path, monkeypatch: pytest.MonkeyPatch, recipe: tuple[str, ...]
) -> None:
    """As Python runs them where numba is not installed."""
    monkeypatch.setattr(rtn, "kernels", lambda: compiled.kernels() or compiled.Kernels())
    rounded, seen = compiled.Kernels.rounded, []
    monkeypatch.setattr(compiled.Kernels, "rounded", lambda *args: seen.append(1) or rounded(*args))
    whole = run(tiny_llama_bf16, tmp_path / "whole", *recipe, FEW)
    assert not seen  # a small model: by torch
    monkeypatch.setattr(writing, "LARGE", 0)
    monkeypatch.setattr(reading, "BLOCK", 1)
    blocks = run(tiny_llama_bf16, tmp_path / "blocks", *recipe, FEW)
    assert len(seen) > len(blocks.layers) // 2
    assert weights(tmp_path / "blocks") == weights(tmp_path / "whole")
    assert [row.rel_error for row in blocks.layers] == pytest.approx([row.rel_error for row in whole.layers], rel=1e-5)
    assert [row.detail for row in blocks.layers] == [row.detail for row in whole.layers]


@pytest.mark.usefixtures("two_threads")
def test_odd_rows_convolutions_and_plain_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that no block divides, more axes than two, and parameters that are only copied, empty ones among them."""
    tensors = {
        "a.weight": torch.randn(77, 12),
        "conv.weight": torch.randn(45, 3, 2, 2),
        "one.weight": torch.randn(1, 12),
        "norm.weight": torch.randn(100),
        "step": torch.tensor(3),
        "none": torch.zeros(0, 4),
        "ids": torch.arange(90).reshape(45, 2),
    }
    save_file(tensors, tmp_path / "in.safetensors")
    monkeypatch.setattr(reading, "BLOCK", 1)
    monkeypatch.setattr(rtn, "kernels", compiled.Kernels)
    written = []
    for large, divisible in (
        (0, reading.divisible),  # the compiled passes, as Python runs them
        (writing.LARGE, reading.divisible),
        (writing.LARGE, lambda *_: False),
    ):
        monkeypatch.setattr(writing, "LARGE", large)
        monkeypatch.setattr(reading, "divisible", divisible)
        out = tmp_path / f"{len(written)}.safetensors"
        run(tmp_path / "in.safetensors", out, "quantize/rtn-w4", "method.group_size=4")
        written.append(out.read_bytes())
    assert written[0] == written[1] == written[2]


@pytest.mark.parametrize("large", [0, writing.LARGE])
@pytest.mark.parametrize("name", ["a.weight", "a.bias"])
def test_what_is_not_finite_in_one_block_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, large: int
) -> None:
    monkeypatch.setattr(rtn, "kernels", compiled.Kernels)
    monkeypatch.setattr(writing, "LARGE", large)
    tensors = {"a.weight": torch.randn(96, 128), "a.bias": torch.randn(96)}
    tensors[name][70] = torch.inf
    save_file(tensors, tmp_path / "in.safetensors")
    monkeypatch.setattr(reading, "BLOCK", 1)
    with pytest.raises(CheckpointError, match=f"{name.removesuffix('.weight')}.* NaN or infinite"):
        run(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "quantize/rtn-w4")
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_large_values_are_not_taken_for_infinite(tmp_path: Path) -> None:
    """Their squares overflow float32."""
    save_file({"a.weight": torch.full((32, 128), 3e25)}, tmp_path / "in.safetensors")
    overrides: Any = ("method.scale_dtype=float32",)
    report = run(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "quantize/rtn-w4", *overrides)
    assert report.layers[0].rel_error == pytest.approx(1 / 15, rel=1e-3)


@pytest.mark.parametrize(
    ("command", "recipe"), [("quantize", "rtn-w8"), ("prune", "magnitude-50"), ("factorize", "svd-keep")]
)
def test_empty_tensors_are_copied(command: str, recipe: str, tmp_path: Path) -> None:
    """Such as the register tokens of a vision model that has none."""
    empty = {"tokens": torch.zeros(1, 0, 32), "none": torch.zeros(0, 4)}
    save_file({"w": torch.randn(32, 32), **empty}, tmp_path / "in.safetensors")
    out = Destination(tmp_path / "out.safetensors")
    plan = planner.make_plan(tmp_path / "in.safetensors", out, load(f"{command}/{recipe}", command), command)
    layerwise.run(plan, Options(latency="off"))
    written = load_file(out.path)
    assert {name: written[name].shape for name in empty} == {name: value.shape for name, value in empty.items()}


def test_the_plan_says_what_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two factors the inner one, which makes up for the outer one; layers that share a matrix are read in blocks."""
    monkeypatch.setattr(reading, "BLOCK", 1 << 12)
    shapes = {"fc": (96, 72), "small": (8, 8)}
    tensors = {f"layers.{n}.{name}.weight": torch.randn(shape) for n in range(2) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "dense.safetensors")
    factors = LowRank(Dense(torch.randn(96, 72)), Dense(torch.randn(72, 80)))
    write_form(tmp_path / "factors.safetensors", factors, factors.tensors())
    told = {}
    for name, source, method in (
        ("base_delta", "dense", {"keep": 0.8, "whiten": False}),
        ("svd", "dense", {"keep": 0.5}),
        ("rtn", "factors", {"group_size": 8}),
    ):
        (tmp_path / "recipe.yaml").write_text(json.dumps({"version": 1, "method": {"name": name, **method}}))
        command = "quantize" if name == "rtn" else "factorize"
        made, out = load(tmp_path / "recipe.yaml", command), Destination(tmp_path / "out.safetensors")
        plan = planner.make_plan(tmp_path / f"{source}.safetensors", out, made, command)
        told[name] = [note for note in plan.notes if "whole" in note]
    assert told["base_delta"] == told["svd"] == []
    (note,) = told["rtn"]
    assert note.startswith("rtn reads matrices whole: fc.low_rank.in takes 23,040 bytes of memory")
