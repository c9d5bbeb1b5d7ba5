"""A layer is read and decoded once: the one that a method compresses is the one whose error is taken and tuned."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from aicompress.checkpoint import Checkpoint
from aicompress.layer import Layer, LayerInfo
from aicompress.pipeline.layerwise import run as layerwise
from tests.pipeline.calibration.steps import GPTQ, OFF, planned, text, write_recipe

IMATRIX = {"name": "imatrix", "bits": 4, "group_size": 16}


@dataclasses.dataclass(frozen=True)
class CountingCheckpoint(Checkpoint):
    """A checkpoint that counts what it reads as layers for a method."""

    reads: Counter[str] = dataclasses.field(default_factory=Counter)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> CountingCheckpoint:
        return cls(**{own.name: getattr(checkpoint, own.name) for own in dataclasses.fields(Checkpoint)})

    def layer(self, info: LayerInfo, seed: int = 0) -> Layer:
        self.reads[info.name] += 1
        return super().layer(info, seed)


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
