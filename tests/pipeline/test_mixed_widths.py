"""Widths by rule: every reader decodes each layer with its own, and no config tells it to decode all with one."""

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
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe import load

IDS = torch.arange(2, 26).reshape(2, 12)
EIGHT = {"match": "*.down_proj", "bits": 8, "granularity": "channel"}
WIDTHS: dict[str, dict[str, Any]] = {
    "symmetric": {"method": {"name": "rtn", "bits": 4, "group_size": 32}, "rules": [EIGHT]},
    "zero points": {"method": {"name": "rtn", "bits": 4, "group_size": 32, "symmetric": False}, "rules": [EIGHT]},
    "embeddings": {
        "method": {"name": "rtn", "bits": 4, "group_size": 32},
        "rules": [{"match": "*.embed_tokens", "bits": 8, "granularity": "channel"}],
        "select": {"kinds": ["linear", "embedding"]},
    },
}


def step(source: Path, out: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    path = out.with_suffix(".yaml")
    path.write_text(json.dumps({"version": 1, **recipe}))
    planned = planner.make_plan(source, Destination(out), load(str(path), "quantize"), "quantize")
    layerwise.run(planned, Options(latency="off"))
    found: dict[str, Any] = json.loads((out / "config.json").read_text())["quantization_config"]
    return found


def decoded(source: Path, out: Path) -> Any:
    """The original model with the matrices that the output holds."""
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    written = Checkpoint.open(out)
    for name in written.manifest.entries:
        model.get_parameter(name).data = written.dense(name).float()
    return model


@pytest.mark.parametrize("case", WIDTHS)
@torch.no_grad()
def test_each_layer_is_read_with_its_own_width(case: str, tmp_path: Path, tiny_llama: Path) -> None:
    config = step(tiny_llama, tmp_path / "out", WIDTHS[case])
    assert "dequantize" not in config
    assert {entry.meta["bits"] for entry in Checkpoint.open(tmp_path / "out").manifest.entries.values()} == {4, 8}
    running = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = decoded(tiny_llama, tmp_path / "out")(IDS).logits
    torch.testing.assert_close(running(IDS).logits, expected, rtol=2e-3, atol=2e-2)


@torch.no_grad()
def test_one_width_with_embeddings_is_decoded_by_any_reader(tmp_path: Path, tiny_llama: Path) -> None:
    whole = {"method": {"name": "rtn", "bits": 4, "group_size": 32}, "select": {"kinds": ["linear", "embedding"]}}
    assert step(tiny_llama, tmp_path / "out", whole)["dequantize"] is True
    running = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = decoded(tiny_llama, tmp_path / "out")(IDS).logits
    torch.testing.assert_close(running(IDS).logits, expected, rtol=2e-3, atol=2e-2)


def test_a_quantized_checkpoint_is_quantized_again(tmp_path: Path, tiny_llama: Path) -> None:
    """From zero points to symmetric codes: what is rounded is what the first step left."""
    first = {"method": {"name": "rtn", "bits": 8, "group_size": 32, "symmetric": False}}
    step(tiny_llama, tmp_path / "once", first)
    step(tmp_path / "once", tmp_path / "twice", {"method": {"name": "rtn", "bits": 4, "group_size": 32}})
    once, twice = Checkpoint.open(tmp_path / "once"), Checkpoint.open(tmp_path / "twice")
    for name, entry in twice.manifest.entries.items():
        assert entry.meta["bits"] == 4
        matrix = once.dense(name).float()
        groups = matrix.reshape(len(matrix), -1, 32)
        scale = (groups.abs().amax(-1, keepdim=True) / 7.5).half().float()
        rounded = ((groups / scale).round().clamp(-8, 7) * scale).reshape(matrix.shape)
        torch.testing.assert_close(twice.weight(name).dense(), rounded)
