"""Layers of small values beside others: what the rounding of their scales costs is kept small, or said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aicompress import load
from aicompress import recipe as recipes
from aicompress.pipeline import steps
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.report.model import Report


def quantized(folder: Path, deviation: float, *edits: str) -> tuple[Report, float]:
    """A file of one layer, quantized; its report and its relative error."""
    matrix = deviation * torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    save_file({"fc.weight": matrix}, folder / "in.safetensors")
    recipe = recipes.load("quantize/rtn-w8", "quantize", list(edits))
    out = Destination(folder / "out.safetensors", overwrite=True)
    report = steps.run(steps.make_plan(folder / "in.safetensors", out, recipe, "quantize"), Options(latency="off"))
    decoded = load(out.path)["fc.weight"]
    return report, float((decoded - matrix).norm() / matrix.norm())


@pytest.mark.parametrize("deviation", [1e-3, 1e-5])
def test_small_layers_cost_what_others_do(deviation: float, tmp_path: Path) -> None:
    _, usual = quantized(tmp_path, 0.05)
    report, error = quantized(tmp_path, deviation)
    assert error < 1.35 * usual
    assert not any("float16" in warning for warning in report.warnings) or deviation < 1e-4


@pytest.mark.parametrize("edits", [(), ("method.granularity=tensor",)], ids=["blocks of rows", "whole"])
def test_smaller_ones_are_warned_about_with_what_helps(edits: tuple[str, ...], tmp_path: Path) -> None:
    report, error = quantized(tmp_path, 1e-7, *edits)
    assert error > 0.02
    assert any("fc are too small for float16 scales: set method.scale_dtype" in warning for warning in report.warnings)
    report, error = quantized(tmp_path, 1e-7, *edits, "method.scale_dtype=float32")
    assert error < 0.01
    assert not any("float16" in warning for warning in report.warnings)
    assert load_file(tmp_path / "out.safetensors")["fc.weight_scale"].dtype is torch.float32


def test_a_layer_of_which_nothing_is_left_is_named(tmp_path: Path) -> None:
    tensors = {"gate.weight": torch.tensor([[-0.0948, 0.0993, 0.2886, 0.0453]]), "fc.weight": torch.randn(16, 32)}
    save_file(tensors, tmp_path / "in.safetensors")
    recipe = recipes.load("quantize/rdo-3bpw", "quantize", [])
    out = Destination(tmp_path / "out.safetensors")
    report = steps.run(steps.make_plan(tmp_path / "in.safetensors", out, recipe, "quantize"), Options(latency="off"))
    decoded = load(out.path)
    gone = [name for name, tensor in decoded.items() if not tensor.any()]
    assert gone == ["gate.weight"]
    assert any("all weights of gate became zero" in warning for warning in report.warnings)
