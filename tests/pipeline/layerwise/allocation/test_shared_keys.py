"""Widths searched on models whose last blocks read keys and values of others: what is measured is what is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from aicompress.checkpoint import Checkpoint
from aicompress.model.loading.load import load
from tests.pipeline.calibration.steps import run, write_recipe
from tests.pipeline.families import gemma3n, gemma4

IDS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))


def divergence(original: Any, other: Any) -> float:
    """Mean over the positions of all samples."""
    with torch.no_grad():
        p, q = (torch.log_softmax(model(input_ids=IDS).logits, -1) for model in (original, other))
    return float(((p - q) * p.exp()).sum(-1).mean())


@pytest.mark.parametrize("make", [gemma3n, gemma4])
def test_what_is_measured_is_what_is_written(make: Callable[[int, int], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    make(4, 2).save_pretrained(tmp_path / "in")
    save_file({"input_ids": IDS}, tmp_path / "ids.safetensors")
    data = {"arrays": str(tmp_path / "ids.safetensors"), "inputs": ["input_ids"]}
    method = {"name": "rtn", "bits": "auto", "group_size": 16, "group_sizes": [16], "choices": [2, 4]}
    method |= {"samples": 2, "evaluations": 1, "target_bpw": 4.0}
    select = {"include": ["*.self_attn.*"]}
    report = run(tmp_path / "in", tmp_path / "out", write_recipe(tmp_path, data, method=method, select=select))
    original, written = (load(tmp_path / name, kernels="reference") for name in ("in", "out"))
    assert report.bits["after"] == pytest.approx(divergence(original, written), rel=1e-3)
    units = {name: unit for unit in report.bits["units"] for name in unit["layers"]}
    stored, lender = Checkpoint.open(tmp_path / "out"), "model.layers.1.self_attn.k_proj"
    for name in units[lender]["layers"]:  # the last block reads these keys
        original.get_submodule(name).weight.data = stored.dense(f"{name}.weight")
    option = next(each for each in units[lender]["options"] if each["bits"] == units[lender]["bits"])
    assert option["loss"] == pytest.approx(divergence(load(tmp_path / "in"), original), rel=1e-3)
