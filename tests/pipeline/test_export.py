"""`export --to dense` writes a plain checkpoint of any compressed one, which stock transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from aicompress.checkpoint import Checkpoint
from aicompress.cli.app import app
from aicompress.errors import Refused
from aicompress.pipeline import export, steps
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.verify import verify
from aicompress.recipe import load as load_recipe
from aicompress.recipe.made import ExportRecipe, Target
from aicompress.report.model import Report
from tests import foreign
from tests.model.compressed import compress, integers
from tests.pipeline.steps import prune

OFF = Options(latency="off")


def exported(source: Path, out: Path) -> Report:
    """Export; the plan's bytes must be those of the run, and what is written must be plain and sound."""
    plan = export.make_plan(source, Destination(out), ExportRecipe())
    assert plan.summary().rows
    report = export.run(plan, OFF)
    written = Checkpoint.open(out)
    assert written.layout == "plain"
    assert plan.output.weight_bytes == report.after.weight_bytes
    before = Checkpoint.open(source)
    assert written.parameters() == before.parameters()
    assert all(torch.equal(written.dense(name), before.dense(name)) for name in before.parameters())
    assert verify(out).sound
    return report


RECIPES = {
    "compressed-tensors": ("quantize", "quantize/rtn-w4-channel"),
    "factors": ("factorize", "factorize/svd-keep"),
    "sparse": ("prune", "prune/magnitude-90-sparse"),
}


@pytest.mark.parametrize("form", RECIPES)
def test_our_own_forms(tiny_llama: Path, tmp_path: Path, form: str) -> None:
    command, recipe = RECIPES[form]
    plan = steps.make_plan(tiny_llama, Destination(tmp_path / "small"), load_recipe(recipe, command), command)
    steps.run(plan, OFF)
    report = exported(tmp_path / "small", tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    assert "auto_map" not in config
    assert not list((tmp_path / "dense").glob("*_aicompress.py"))
    assert [step["command"] for step in report.lineage] == [command, "export"]
    assert any(row.note == "decoded" and row.bytes_after > row.bytes_before for row in report.layers)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(stock.get_parameter(name), Checkpoint.open(tmp_path / "small").dense(name))


@pytest.mark.parametrize(
    ("encode", "settings"),
    [
        (foreign.fp8(), {"quant_method": "fp8"}),
        (foreign.nf4(nested=True), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        (foreign.gptq(symmetric=False, order=True), {"quant_method": "gptq", "bits": 4, "group_size": 32}),
    ],
)
def test_layouts_of_other_tools(tiny_llama: Path, tmp_path: Path, encode: Any, settings: Any) -> None:
    dense = foreign.convert(tiny_llama, tmp_path / "in", encode, settings)
    exported(tmp_path / "in", tmp_path / "dense")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    for name, matrix in dense.items():
        torch.testing.assert_close(stock.get_parameter(name).detach(), matrix, rtol=1e-6, atol=0)


def test_one_file(mlp_file: Path, tmp_path: Path) -> None:
    small = compress(mlp_file, tmp_path / "small.safetensors", lambda info, matrix: integers(matrix, 4))
    exported(small, tmp_path / "dense.safetensors")
    assert load_file(tmp_path / "dense.safetensors")["fc1.weight"].shape == (300, 784)


def test_widths_that_config_json_cannot_say_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    narrow = {"name": "width", "keep": 0.5, "multiple": 1, "widths": "per_layer"}
    prune(tiny_llama, tmp_path / "narrow", **narrow)
    with pytest.raises(Refused, match="unlike widths") as refusal:
        export.make_plan(tmp_path / "narrow", Destination(tmp_path / "dense"), ExportRecipe())
    assert "OUT.safetensors" in refusal.value.hint


def test_the_command(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign.convert(tiny_llama, tmp_path / "in", foreign.fp8(32, 32), {"quant_method": "fp8"})
    call = ["export", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "dense"]
    app([*call, "--dry-run"], standalone_mode=False)
    plan = capsys.readouterr().out
    assert "fp8, blocks of 32 × 32" in plan
    assert not (tmp_path / "out").exists()
    app([*call, "--latency", "off"], standalone_mode=False)
    assert "export:" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize(
    ("command", "recipe"), [("quantize", "quantize/rtn-w8"), ("prune", "prune/magnitude-90-sparse")]
)
def test_compact_keeps_every_weight_as_it_is_stored(tmp_path: Path, command: str, recipe: str) -> None:
    torch.manual_seed(0)
    plain, stored, small = (tmp_path / f"{name}.safetensors" for name in ("plain", "stored", "small"))
    save_file({"fc1.weight": torch.randn(16, 20), "fc1.bias": torch.randn(16)}, plain)
    steps.run(steps.make_plan(plain, Destination(stored), load_recipe(recipe, command), command), OFF)
    plan = export.make_plan(stored, Destination(small), ExportRecipe(method=Target(name="compact")))
    report = export.run(plan, OFF)
    before, after = Checkpoint.open(stored), Checkpoint.open(small)
    assert report.after.weight_bytes == plan.output.weight_bytes == small.stat().st_size < stored.stat().st_size / 2
    assert after.specs == before.specs
    assert after.manifest.entries == before.manifest.entries
    assert all(torch.equal(after.read(name), before.read(name)) for name in before.specs)
    assert [step["command"] for step in after.manifest.lineage] == [command, "export"]
    assert report.lineage[0]["recipe_sha256"]  # the report beside it says the rest
    assert verify(small).sound
    plan = steps.make_plan(small, Destination(tmp_path / "on.safetensors"), load_recipe(recipe, command), command)
    assert not steps.run(plan, OFF).warnings


def test_compact_is_for_one_file(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="one file"):
        export.make_plan(tiny_llama, Destination(tmp_path / "out"), ExportRecipe(method=Target(name="compact")))
