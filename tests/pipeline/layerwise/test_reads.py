"""A layer is read and decoded once: the one that a method compresses is the one whose error is taken and tuned."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from aicompress.checkpoint import Checkpoint
from aicompress.layer import Layer, LayerInfo
from aicompress.pipeline.layerwise import planner
from aicompress.pipeline.layerwise import run as layerwise
from aicompress.pipeline.step.output import Destination
from aicompress.recipe import load
from aicompress.weights import Weight
from tests.pipeline.calibration.steps import GPTQ, OFF, planned, text, write_recipe

STEPS = (("factorize", "svd"), ("quantize", "rtn"))
IMATRIX = {"name": "imatrix", "bits": 4, "group_size": 16}


@dataclasses.dataclass(frozen=True)
class CountingCheckpoint(Checkpoint):
    """A checkpoint that counts what it reads as layers for a method, and as parameters in their stored form."""

    reads: Counter[str] = dataclasses.field(default_factory=Counter)
    stored: Counter[str] = dataclasses.field(default_factory=Counter)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> CountingCheckpoint:
        return cls(**{own.name: getattr(checkpoint, own.name) for own in dataclasses.fields(Checkpoint)})

    def layer(self, info: LayerInfo, seed: int = 0, weight: Weight | None = None) -> Layer:
        self.reads[info.name] += 1
        return super().layer(info, seed, weight)

    def weight(self, parameter: str) -> Weight:
        self.stored[parameter] += 1
        return super().weight(parameter)


@pytest.mark.parametrize(
    "sections",
    [
        {"method": GPTQ},
        {"method": {**GPTQ, "shift": 0.5}},
        {"method": GPTQ, "tune": {"steps": 1, "batch": 2}},
        {"method": IMATRIX, "tune": {"steps": 1, "batch": 2}},
    ],
    ids=["gptq", "shifted", "tuned", "tuned one by one"],
)
def test_a_layer_is_read_once(tmp_path: Path, tiny_llama: Path, text_file: Path, sections: dict[str, Any]) -> None:
    recipe = write_recipe(tmp_path, text(text_file, samples=2), **sections)
    plan = planned(tiny_llama, tmp_path / "out", recipe)
    counting = CountingCheckpoint.of(plan.checkpoint)
    report = layerwise.run(dataclasses.replace(plan, checkpoint=counting), OFF)
    compressed = [row.name for row in report.layers if row.method != "-"]
    assert len(compressed) == 21
    assert counting.reads == dict.fromkeys(compressed, 1)


def test_both_factors_come_from_one_reading_of_their_parameter(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "svd.yaml").write_text("version: 1\nmethod: {name: svd, keep: 0.5}\n")
    (tmp_path / "rtn.yaml").write_text("version: 1\nmethod: {name: rtn, bits: 4, granularity: channel}\n")
    recipes = {command: load(str(tmp_path / f"{name}.yaml"), command) for command, name in STEPS}
    svd = planner.make_plan(tiny_llama, Destination(tmp_path / "factors"), recipes["factorize"], "factorize")
    layerwise.run(svd, OFF)
    rtn = planner.make_plan(tmp_path / "factors", Destination(tmp_path / "out"), recipes["quantize"], "quantize")
    counting = CountingCheckpoint.of(rtn.checkpoint)
    layerwise.run(dataclasses.replace(rtn, checkpoint=counting), OFF)
    factors = [layer.info for layer in rtn.layers if layer.info.part and layer.config is not None]
    assert len(factors) == 42
    assert counting.reads == {info.name: 1 for info in factors}
    assert counting.stored == {info.tensor: 1 for info in factors}
