"""Targets: the largest size that fits, to the parameter and the byte; out of reach is refused with what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aicompress.pipeline.step.output import Planned
from aicompress.pipeline.structured import size_targets as targets
from tests.pipeline.families import FAMILIES
from tests.pipeline.steps import plan, prune, refused


@pytest.mark.parametrize("family", ["llama", "whisper"])
@pytest.mark.parametrize("name", ["target_parameters", "target_bytes"])
def test_the_largest_width_that_fits(family: str, name: str, tmp_path: Path) -> None:
    FAMILIES[family].saved(tmp_path / "in")

    def cost(keep: float) -> int:
        output = plan(tmp_path / "in", tmp_path / "x", name="width", keep=keep, multiple=4).output
        if name == "target_bytes":
            return output.weight_bytes
        return sum(torch.Size(p.dense.shape).numel() for p in output.parameters.values())

    widest = 64 if family == "whisper" else 48
    exact, above = cost(20 / widest), cost(24 / widest)
    for target in (exact, above - 1):
        report = prune(tmp_path / "in", tmp_path / f"out{target}", name="width", multiple=4, **{name: target})
        after = report.after.weight_bytes if name == "target_bytes" else report.after.parameters
        assert after == exact <= target
        assert any(f"{name}: 20 of {widest} units stay of each" in line for line in report.notes)


def test_heads_and_blocks(tmp_path: Path) -> None:
    """Only 1, 2 and 4 of 4 heads can be said; blocks go from the end of the choice."""
    FAMILIES["llama"].saved(tmp_path / "in")
    half = plan(tmp_path / "in", tmp_path / "x", name="heads", heads=2).output.weight_bytes
    report = prune(tmp_path / "in", tmp_path / "heads", name="heads", target_bytes=half + 100)
    assert report.after.weight_bytes == half
    three = plan(tmp_path / "in", tmp_path / "x", name="depth", keep_layers=3).output.weight_bytes
    report = prune(tmp_path / "in", tmp_path / "depth", name="depth", strategy="magnitude", target_bytes=three)
    assert report.after.weight_bytes == three


@pytest.mark.parametrize("name", ["width", "heads", "depth"])
def test_out_of_reach_is_refused(name: str, tmp_path: Path) -> None:
    FAMILIES["llama"].saved(tmp_path / "in")
    message = refused(tmp_path / "in", tmp_path / "out", name=name, target_parameters=100)
    assert "target_parameters: 100 is out of reach" in message
    assert "the smallest size that was tried" in message


def test_a_target_above_the_input_changes_nothing(tmp_path: Path) -> None:
    FAMILIES["llama"].saved(tmp_path / "in")
    report = prune(tmp_path / "in", tmp_path / "out", name="width", target_bytes="1GB")
    assert report.after.parameters == report.before.parameters


def test_latency_follows_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With times in proportion to the multiplications, 0.8 of the time is 0.8 of the numbers."""
    FAMILIES["llama-tied"].saved(tmp_path / "in")
    asked: list[tuple[int, int]] = []

    def time(self: targets.LatencyTable, rows: int, columns: int, dtype: torch.dtype) -> float:
        asked.append((rows, columns))
        return rows * columns * 1e-9

    monkeypatch.setattr(targets.LatencyTable, "_of", time)
    planned = plan(tmp_path / "in", tmp_path / "out", name="width", multiple=1, target_latency=0.8)

    def total(parameters: dict[str, Planned]) -> int:
        return sum(torch.Size(p.dense.shape).numel() for p in parameters.values() if p.info and p.info.kind == "linear")

    before = total(plan(tmp_path / "in", tmp_path / "x", name="width", keep=1.0).output.parameters)
    after = total(planned.output.parameters)
    assert 0.8 - 0.01 < after / before <= 0.8
    assert any("of the forward time of the input's matrix layers" in line for line in planned.notes)


def test_the_table_measures_every_shape_once() -> None:
    table = targets.LatencyTable()
    once = table._of(64, 32, torch.float32)
    assert once > 0
    assert table._of(64, 32, torch.float32) == once
    assert table._of(2048, 1024, torch.float32) > once
    assert table._of(64, 32, torch.int8) > 0


@pytest.mark.parametrize("fields", [{"target_bytes": 1, "keep": 0.5}, {"target_latency": 1.5}, {"target_bytes": "x"}])
def test_bad_targets(fields: dict[str, Any]) -> None:
    from pydantic import ValidationError

    from aicompress.methods.prune.width import WidthConfig

    with pytest.raises(ValidationError):
        WidthConfig(**fields)
