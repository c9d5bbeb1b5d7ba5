"""Numbers of a report's two sides, against what is on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aicompress.methods import get
from aicompress.pipeline import steps
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe import Recipe
from aicompress.report.model import Report
from aicompress.report.numbers import number
from aicompress.report.tables import headline


def run(source: Path, out: Path, command: str, **method: Any) -> Report:
    recipe = Recipe(version=1, method=get(command, method["name"]).config(**method))
    plan = steps.make_plan(source, Destination(out), recipe, command)
    return steps.run(plan, Options(latency="off", started=0.0))


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_bits_are_of_every_weight_that_the_input_stands_for(mlp_file: Path, tmp_path: Path, sparsity: float) -> None:
    numbers = sum(tensor.numel() for tensor in load_file(mlp_file).values())
    pruned, quantized = tmp_path / "pruned.safetensors", tmp_path / "quantized.safetensors"
    for report in (
        run(mlp_file, pruned, "prune", name="magnitude", sparsity=sparsity, store="sparse"),
        run(pruned, quantized, "quantize", name="rtn", bits=4, granularity="channel"),
    ):
        assert report.before is not None
        assert report.before.weights == report.after.weights == numbers
        assert report.bits_per_original_weight == 8 * Path(report.after.path).stat().st_size / numbers
        assert f"; {number(report.bits_per_original_weight, 3)} bits per original weight" in headline(report)


def test_the_report_of_an_input_is_not_counted(tiny_llama: Path, tmp_path: Path) -> None:
    first = run(tiny_llama, tmp_path / "one", "quantize", name="rtn", bits=8, granularity="channel")
    second = run(tmp_path / "one", tmp_path / "two", "quantize", name="rtn", bits=4, granularity="channel")
    assert second.before is not None
    assert second.before.bytes == first.after.bytes
    reports = {"report.json", "report.md", "report.html"}
    on_disk = sum(
        file.stat().st_size for file in (tmp_path / "one").rglob("*") if file.is_file() and file.name not in reports
    )
    assert first.after.bytes == on_disk


def test_a_name_does_not_decide_the_kind(tmp_path: Path) -> None:
    weights = {"upscale.fc.weight": torch.randn(64, 64), "upscale.fc.bias": torch.randn(64)}
    save_file(weights, tmp_path / "in.safetensors")
    method = {"name": "rtn", "bits": 4, "granularity": "group", "group_size": 32, "symmetric": False}
    report = run(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "quantize", **method)
    assert report.before is not None
    assert report.before.by_kind == {"linear": 64 * 64 * 4, "other": 64 * 4, "header": report.before.by_kind["header"]}
    stored = load_file(tmp_path / "out.safetensors")
    grids = {name for name in stored if name.rpartition("_")[2] in ("scale", "zero", "point")}
    assert len(grids) == 2
    assert report.after.by_kind["scale"] == sum(stored[name].nbytes for name in grids)
    assert report.after.by_kind["linear"] == sum(
        stored[name].nbytes for name in stored.keys() - grids - {"upscale.fc.bias"}
    )


def test_what_the_user_waited_holds_the_work(mlp_file: Path, tmp_path: Path) -> None:
    report = run(mlp_file, tmp_path / "out.safetensors", "quantize", name="rtn", bits=8, granularity="channel")
    assert report.waited is not None
    assert report.waited > report.seconds
