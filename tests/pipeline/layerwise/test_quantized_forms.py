"""Every form that a quantization method returns goes to disk, and runs from there as the same matrices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import aicompress.hf  # noqa: F401  registers the native layout with transformers
from aicompress.checkpoint import Checkpoint
from aicompress.pipeline.layerwise import planner
from aicompress.pipeline.layerwise import run as layerwise
from aicompress.pipeline.step.output import Destination
from aicompress.recipe import load
from tests.pipeline.calibration.steps import OFF, text

METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "rtn": ({"bits": 4, "group_size": 48, "pad": True, "symmetric": False}, "int_grouped"),
    "hqq": ({"group_size": 16}, "int_grouped"),
    "sinq": ({"group_size": 16}, "column_scaled"),
    "nf4": ({"group_size": 16}, "codebook"),
    "kmeans": ({"granularity": "channel"}, "codebook"),
    "squeezellm": ({"bits": 3, "granularity": "tensor"}, "codebook"),
    "imatrix": ({"group_size": 16}, "int_grouped"),
    "qera": ({"rank": 4, "base": {"name": "gptq", "bits": 3, "group_size": 16}}, "corrected"),
}
IDS = torch.arange(2, 26).reshape(2, 12)


@pytest.mark.parametrize("name", METHODS)
def test_written_read_and_run(name: str, tmp_path: Path, tiny_llama: Path, text_file: Path) -> None:
    fields, form = METHODS[name]
    recipe = tmp_path / "recipe.yaml"
    method = {"name": name, **fields}
    recipe.write_text(json.dumps({"version": 1, "method": method, "calibration": text(text_file)}))
    loaded = load(str(recipe), "quantize")
    planned = planner.make_plan(tiny_llama, Destination(tmp_path / "out"), loaded, "quantize")
    report = layerwise.run(planned, OFF)
    assert planned.output.weight_bytes == report.after.weight_bytes < report.before.weight_bytes

    written = Checkpoint.open(tmp_path / "out")
    entries = {info.tensor: info for info in written.layers(None) if info.stored != "dense"}
    assert {info.stored for info in entries.values()} == {form}
    assert len(entries) == 3 * 7

    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    for tensor in entries:
        model.get_parameter(tensor).data = written.weight(tensor).dense()
    running = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(running(IDS).logits, model(IDS).logits, rtol=2e-3, atol=2e-2)
