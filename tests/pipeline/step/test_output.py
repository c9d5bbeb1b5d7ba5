"""What lies in an output beside the weights, and how inputs and outputs of every shape go together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.source import INDEX, MODELING_FILES
from aicompress.pipeline.layerwise import planner
from aicompress.pipeline.layerwise import run as layerwise
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe import load


def run(source: Path, out: Path, recipe: str = "quantize/rtn-w8", *edits: str, size: int | None = None) -> None:
    command = recipe.split("/")[0]
    step = planner.make_plan(source, Destination(out, size), load(recipe, command, edits), command)
    layerwise.run(step, Options(latency="off"))


def test_side_files_are_the_inputs_own(tmp_path: Path, tiny_bert: Path) -> None:
    source = Path(shutil.copytree(tiny_bert, tmp_path / "in"))
    (source / "2_Dense").mkdir()
    save_file({"linear.weight": torch.ones(2, 2)}, source / "2_Dense" / "model.safetensors")
    modules = json.loads((source / "modules.json").read_text())
    (source / "modules.json").write_text(
        json.dumps([*modules, {"idx": 3, "name": "3", "path": "2_Dense", "type": "x"}])
    )
    run(source, tmp_path / "out")
    for path in source.rglob("*"):
        relative = path.relative_to(source)
        if path.is_file() and relative.as_posix() not in ("config.json", "model.safetensors"):
            assert (tmp_path / "out" / relative).read_bytes() == path.read_bytes()
    ours = {"config.json", "aicompress.json", "model.safetensors", "report.json", "report.md", "report.html"}
    extra = {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*")} - {
        p.relative_to(source) for p in source.rglob("*")
    }
    assert {path.as_posix() for path in extra} <= ours


def test_headers_say_what_old_readers_look_for(tmp_path: Path, tiny_llama: Path) -> None:
    run(tiny_llama, tmp_path / "out", size=60_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["format"] == "pt"
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert index["metadata"]["total_parameters"] == sum(
        torch.Size(spec.shape).numel() for spec in Checkpoint.open(tiny_llama).parameters().values()
    )


def test_a_directory_into_one_file_and_back(tmp_path: Path, tiny_llama: Path) -> None:
    run(tiny_llama, tmp_path / "one.safetensors")
    run(tmp_path / "one.safetensors", tmp_path / "two", "prune/magnitude-50")
    assert {path.name for path in tmp_path.iterdir()} == {
        *("one.safetensors", "one.report.json", "one.report.md", "one.report.html", "two")
    }
    found = Checkpoint.open(tmp_path / "two")
    assert found.parameters() == Checkpoint.open(tiny_llama).parameters()
    assert [step["command"] for step in found.manifest.lineage] == ["quantize", "prune"]


def test_a_form_that_needs_its_own_reader_brings_it_and_takes_it_away_again(tmp_path: Path, tiny_llama: Path) -> None:
    run(tiny_llama, tmp_path / "low", "factorize/svd-keep")
    assert all((tmp_path / "low" / name).is_file() for name in MODELING_FILES)
    stale = tmp_path / "low" / MODELING_FILES[0]
    stale.write_text("# of an older version")
    run(tmp_path / "low", tmp_path / "again", "quantize/rtn-w8")
    assert (tmp_path / "again" / MODELING_FILES[0]).read_text() != "# of an older version"
    shutil.copy(stale, shutil.copytree(tiny_llama, tmp_path / "plain"))
    run(tmp_path / "plain", tmp_path / "int8")
    assert not (tmp_path / "int8" / MODELING_FILES[0]).exists()
    assert "auto_map" not in json.loads((tmp_path / "int8" / "config.json").read_text())


def test_odd_names_and_shapes_come_through(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "weight": torch.randn(8, 8),
        "层.weight": torch.randn(8, 8),
        "blocks[0].weight": torch.randn(8, 8),
        "scalar": torch.tensor(3.0),
        "steps": torch.tensor(7),
        "nothing": torch.empty(0, 4),
        "nothing.weight": torch.empty(4, 0),
        "flags": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "in.safetensors")
    run(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "quantize/rtn-w8", "select.exclude=['blocks[0]']")
    written = Checkpoint.open(tmp_path / "out.safetensors")
    assert set(written.manifest.entries) == {"weight", "层.weight"}
    for name, tensor in tensors.items():
        found = written.dense(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        if name in written.manifest.entries:
            assert torch.allclose(found, tensor, atol=0.02)
        else:
            assert torch.equal(found, tensor)
