"""Networks with config.json: stages get narrower, and stock transformers loads them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from aicompress.errors import CompressError
from aicompress.model.channels.cut import cut_module
from aicompress.pipeline.channels import run as driver
from aicompress.pipeline.channels.planner import make_plan
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe.step import Calibration
from tests.pipeline.channels.networks import lively
from tests.pipeline.channels.test_run import recipe
from tests.pipeline.steps import loaded

IMAGES = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
RESNET = {"embedding_size": 16, "depths": [2, 1], "num_labels": 5, "image_size": 32}
CONVNEXT = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "image_size": 32, "num_labels": 5}
NETWORKS: dict[str, Callable[[], Any]] = {
    "basic": lambda: hf.ResNetForImageClassification(
        hf.ResNetConfig(**RESNET, hidden_sizes=[16, 24], layer_type="basic")
    ),
    "bottleneck": lambda: hf.ResNetForImageClassification(
        hf.ResNetConfig(**RESNET, hidden_sizes=[32, 64], layer_type="bottleneck")
    ),
    "convnext": lambda: hf.ConvNextForImageClassification(hf.ConvNextConfig(**CONVNEXT)),
}


def saved(name: str, folder: Path) -> Any:
    model = lively(NETWORKS[name]())
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_stages_get_narrower(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path / "in")
    found = make_plan(tmp_path / "in", Destination(tmp_path / "out"), recipe(None, keep=0.5), "prune")
    report = driver.run(found, Options(latency="off"))
    assert found.output.weight_bytes == report.after.weight_bytes
    before, after = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("in", "out"))
    assert after["hidden_sizes"] == [size // 2 for size in before["hidden_sizes"]]
    wanted = copy.deepcopy(model)
    cut_module(wanted, found.kept)
    with torch.no_grad():
        torch.testing.assert_close(loaded(model, tmp_path / "out")(IMAGES).logits, wanted(IMAGES).logits)
    assert report.after.parameters < 0.4 * report.before.parameters


def test_calibration_repairs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = NETWORKS["basic"]().train()
    with torch.no_grad():
        for _ in range(20):
            model(IMAGES)  # running statistics
    model.eval().save_pretrained(tmp_path / "in")
    np.savez(tmp_path / "images.npz", images=IMAGES.numpy())
    data = Calibration(arrays=str(tmp_path / "images.npz"), inputs="images")
    errors = []
    for number, calibration in enumerate((None, data)):
        steps = recipe(None, calibration, keep=0.75, score="l2")
        out = tmp_path / f"{number}"
        driver.run(make_plan(tmp_path / "in", Destination(out), steps, "prune"), Options(latency="off"))
        with torch.no_grad():
            wanted = model(IMAGES).logits
            errors.append(float((loaded(model, out)(IMAGES).logits - wanted).norm() / wanted.norm()))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    ("build", "method", "expected"),
    [
        (NETWORKS["basic"], {"keep": 0.5, "scope": "global"}, "one width for a stage"),
        (NETWORKS["basic"], {"target_parameters": 9000}, "one width for a stage"),
        (
            lambda: hf.ResNetModel(hf.ResNetConfig(**RESNET, hidden_sizes=[16, 24], layer_type="basic")),
            {"keep": 0.5},
            "config.json cannot express fewer channels: encoder.stages.1",
        ),
        (
            lambda: hf.ViTModel(hf.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)),
            {"keep": 0.5},
            "holds no widths of stages",
        ),
    ],
)
def test_refusals(build: Callable[[], Any], method: dict[str, Any], expected: str, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "in")
    with pytest.raises(CompressError) as found:
        make_plan(tmp_path / "in", Destination(tmp_path / "out"), recipe(None, **method), "prune")
    assert expected in found.value.message
    assert found.value.hint
    assert not (tmp_path / "out").exists()
