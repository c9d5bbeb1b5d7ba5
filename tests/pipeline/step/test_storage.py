"""`storage: entropy`: the same weights in fewer bytes, which every command reads, and no damage turns into noise."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import aicompress
from aicompress.checkpoint import Checkpoint
from aicompress.cli.app import app
from aicompress.errors import CheckpointError, CompressError, Refused
from aicompress.model.hf import decoding_aicompress
from aicompress.model.loading.load import load
from aicompress.pipeline import export, steps
from aicompress.pipeline.inspect import inspect
from aicompress.pipeline.step import storage
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.verify import verify
from aicompress.recipe import load as load_recipe
from aicompress.recipe.made import ExportRecipe, Target
from aicompress.report.model import Report

OFF = Options(latency="off")
ENTROPY = "storage=entropy"
IDS = torch.arange(2, 26).reshape(2, 12)


def run(source: Path, out: Path, recipe: str, *edits: str, size: int | None = None) -> Report:
    """Run a step; where codes are entropy-coded, the plan's bytes are the most that it takes."""
    command = recipe.split("/")[0]
    plan = steps.make_plan(source, Destination(out, size), load_recipe(recipe, command, edits), command)
    report = steps.run(plan, OFF)
    planned, written = plan.summary().weight_bytes, report.after.weight_bytes
    assert (planned > written) if plan.output.entropy_coded else (planned == written)
    assert verify(out).sound
    return report


def stored(path: Path, name: str) -> str:
    """The form in which a checkpoint's files hold a parameter."""
    outline = Checkpoint.open(path).stored_outline(name)
    return "dense" if outline is None else outline.form


def same(path: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same numbers."""
    one, two = Checkpoint.open(path), Checkpoint.open(other)
    return all(torch.equal(one.dense(name), two.dense(name)) for name in one.parameters())


@pytest.mark.parametrize(
    ("recipe", "edits"),
    [
        ("quantize/rtn-w4", ("method.granularity=tensor", "method.range=minmax", "select.kinds=[linear,embedding]")),
        ("prune/magnitude-90-sparse", ("method.sparsity=0.97",)),
    ],
)
def test_the_same_weights_in_fewer_bytes(tiny_llama: Path, tmp_path: Path, recipe: str, edits: tuple[str, ...]) -> None:
    fixed = run(tiny_llama, tmp_path / "fixed", recipe, *edits)
    coded = run(tiny_llama, tmp_path / "coded", recipe, *edits, ENTROPY, size=60_000)
    assert coded.after.weight_bytes < fixed.after.weight_bytes
    assert same(tmp_path / "coded", tmp_path / "fixed")
    assert sum(row.bytes_after for row in coded.layers) < sum(row.bytes_after for row in fixed.layers)
    assert sum(row.nbytes for row in inspect(tmp_path / "coded").rows) == sum(
        spec.nbytes for spec in Checkpoint.open(tmp_path / "coded").specs.values()
    )
    for kernels in ("fast", "reference"):
        one, two = (load(tmp_path / name, kernels=kernels)(IDS).logits for name in ("coded", "fixed"))
        assert torch.equal(one, two)


def test_a_later_step_keeps_it(mlp_file: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.safetensors" for name in ("fixed", "coded", "later", "plainly", "again")}
    run(mlp_file, files["fixed"], "quantize/rtn-w8")
    run(mlp_file, files["coded"], "quantize/rtn-w8", ENTROPY)
    first = next(iter(info.tensor for info in Checkpoint.open(mlp_file).layers()))
    one = (f"select.include=[{first.removesuffix('.weight')}]", "method.bits=8", "method.granularity=channel")
    run(files["coded"], files["later"], "quantize/rtn-w8", *one)
    run(files["fixed"], files["plainly"], "quantize/rtn-w8", *one)
    assert same(files["later"], files["plainly"])
    assert stored(files["later"], first) == "entropy"
    run(files["coded"], files["again"], "quantize/rtn-w8", *one, "storage=fixed")
    assert stored(files["again"], first) == "int_grouped"
    assert load_file(files["again"]).keys() == load_file(files["plainly"]).keys()


def test_a_checkpoint_is_stored_otherwise_and_back(tiny_llama: Path, tmp_path: Path) -> None:
    run(tiny_llama, tmp_path / "fixed", "quantize/rtn-w4", "method.granularity=tensor", "method.range=minmax")
    for source, to in (("fixed", "entropy"), ("entropy", "again")):
        name = "entropy" if to == "entropy" else "fixed"
        recipe = ExportRecipe(method=Target(name=name), storage=name)
        export.run(export.make_plan(tmp_path / source, Destination(tmp_path / to), recipe), OFF)
    assert stored(tmp_path / "entropy", "model.layers.0.mlp.up_proj.weight") == "entropy"
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("fixed", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    with pytest.raises(Refused, match="no codes"):
        export.make_plan(tiny_llama, Destination(tmp_path / "none"), recipe)


def test_the_decoder_in_a_checkpoint_needs_no_package(mlp_file: Path, tmp_path: Path) -> None:
    run(mlp_file, tmp_path / "coded.safetensors", "quantize/rtn-w8", ENTROPY)
    module = types.ModuleType("decoding_of_a_checkpoint")
    sys.modules[module.__name__] = module
    exec(decoding_aicompress.source(), module.__dict__)
    coded = Checkpoint.open(tmp_path / "coded.safetensors")
    for compiled in (True, False):
        module.COMPILED.update({} if compiled else dict.fromkeys(module.SHIPPED))
        for name, entry in coded.manifest.entries.items():
            tensors = {suffix: coded.read(disk) for suffix, disk in coded.stored_names(name).items()}
            decoded = module.decode(json.loads(json.dumps(entry.meta)), tensors)
            torch.testing.assert_close(decoded.float(), coded.weight(name).dense(), rtol=1e-3, atol=1e-6)
    del sys.modules[module.__name__]


def test_damage_is_an_error_of_one_line(mlp_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "coded.safetensors"
    run(mlp_file, path, "quantize/rtn-w8", ENTROPY)
    coded = Checkpoint.open(path)
    name = next(iter(coded.manifest.entries))
    whole = path.read_bytes()
    ref = coded.tensors[name]
    damaged = bytearray(whole)
    damaged[ref.begin + ref.spec.nbytes // 2] ^= 16
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"cannot be decoded: a stream of symbols is damaged") as caught:
        aicompress.load(path)
    assert "\n" not in str(caught.value)
    assert verify(path).problems


def test_a_file_that_would_need_much_memory_is_refused(mlp_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "coded.safetensors"
    run(mlp_file, path, "quantize/rtn-w8", ENTROPY)
    coded = Checkpoint.open(path)
    name, entry = next(iter(coded.manifest.entries.items()))
    manifest = json.loads(coded.metadata["aicompress"])
    described = manifest["entries"][name]
    rows = 1 << 24
    described["shape"][0] = described["meta"]["inner"]["shape"][0] = described["meta"]["coded"][""][1] = rows
    tensors = load_file(path)
    save_file(tensors, path, {"aicompress": json.dumps(manifest)})
    assert entry.dense.shape[0] < rows
    with pytest.raises(CompressError, match=r"\d symbols in a stream of"):
        Checkpoint.open(path)


def test_the_command_line(mlp_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "coded.safetensors")
    with pytest.raises(SystemExit) as ended:
        app(["quantize", str(mlp_file), out, "-r", "quantize/rtn-w8", "--set", ENTROPY, "--dry-run"])
    assert not ended.value.code
    assert "at most" in capsys.readouterr().out


@pytest.mark.parametrize("quantizer", ["uniform", "trellis"])
def test_large_tensors_are_coded_in_blocks_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantizer: str
) -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = {"a.weight": torch.randn(600, 700, generator=draw), "b.weight": torch.randn(64, 32, generator=draw)}
    save_file(tensors | {"c": torch.arange(70000)}, tmp_path / "in.safetensors")
    reads, blocks = [], storage._blocks
    monkeypatch.setattr(storage, "_blocks", lambda *given: reads.append(len(blocks(*given)[0])) or blocks(*given))
    written = []
    for held in (storage.HELD, 1 << 10):
        monkeypatch.setattr(storage, "HELD", held)
        monkeypatch.setattr(storage, "READ", held)
        out = tmp_path / f"{held}.safetensors"
        run(tmp_path / "in.safetensors", out, "quantize/rdo-3bpw", f"method.quantizer={quantizer}")
        written.append(out.read_bytes())
    assert written[0] == written[1]
    assert reads == [3, 1]  # of 256 rows each; so few symbols as the second has are looked at and held


@pytest.mark.parametrize(
    "recipe", [("prune/magnitude-50", "method.sparsity=0.6", "method.store=sparse"), ("quantize/sinq-w4",)], ids="".join
)
def test_masks_and_scaled_codes_are_coded_in_blocks_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: tuple[str, ...]
) -> None:
    save_file({"a.weight": torch.randn(1500, 640).bfloat16()}, tmp_path / "in.safetensors")
    monkeypatch.setattr(storage, "HELD", 1 << 30)
    run(tmp_path / "in.safetensors", tmp_path / "held.safetensors", *recipe, ENTROPY)
    monkeypatch.setattr(storage, "HELD", 1 << 10)
    monkeypatch.setattr(storage, "READ", 1 << 14)
    made, write = [], storage.write_in_blocks
    monkeypatch.setattr(storage, "write_in_blocks", lambda *given: made.append(write(*given)) or made[-1])
    run(tmp_path / "in.safetensors", tmp_path / "blocks.safetensors", *recipe, ENTROPY)
    assert (tmp_path / "held.safetensors").read_bytes() == (tmp_path / "blocks.safetensors").read_bytes()
    assert len(made) == 1
    assert made[0] is not None
