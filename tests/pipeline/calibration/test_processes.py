"""Calibration by several processes gives what one process gives; the first one writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.statistics import StatisticsFile
from aicompress.pipeline.calibration.request import Request
from aicompress.report.model import Report
from tests.pipeline.calibration.steps import run, text, write_recipe
from tests.pipeline.ranks import Ranks


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_qwen_moe"])
def test_two_processes_give_what_one_gives(
    tmp_path: Path, text_file: Path, ranks: Ranks, fixture: str, request: pytest.FixtureRequest
) -> None:
    """Five windows: the processes have unlike shares, and some experts are seen by one alone or by none."""
    source: Path = request.getfixturevalue(fixture)
    method = {"name": "gptq", "bits": 8, "group_size": 8, "refine": 0}
    exact = {**text(text_file, samples=5), "precision": "float32"}
    recipe = write_recipe(tmp_path, exact, method=method)
    one = run(source, tmp_path / "one", recipe)
    printed = ranks.together(source, tmp_path / "two", recipe)
    two = Report.from_json((tmp_path / "two" / "report.json").read_text())
    assert printed.count("report: ") == 1
    assert two.calibration["processes"] == 2
    assert two.calibration["data"] == one.calibration["data"]
    assert [row.note for row in two.layers] == [row.note for row in one.layers]
    alone, shared = Checkpoint.open(tmp_path / "one"), Checkpoint.open(tmp_path / "two")
    for name in alone.parameters():
        # A sum in another order moves a number across a rounding edge here and there.
        step = 2 * alone.dense(name).abs().max().item() / 255
        apart = (shared.dense(name) - alone.dense(name)).abs()
        assert apart.max() < 3 * step
        assert (apart > step / 2).float().mean() < 0.05


def test_two_processes_collect_the_statistics_of_one(
    tmp_path: Path, tiny_qwen_moe: Path, text_file: Path, ranks: Ranks
) -> None:
    recipe = write_recipe(tmp_path, text(text_file, samples=3), method={"name": "gptq", "bits": 8, "group_size": 8})
    run(tiny_qwen_moe, tmp_path / "one", recipe, Request(stats=(tmp_path / "one.safetensors",)))
    ranks.together(tiny_qwen_moe, tmp_path / "two", recipe, "--stats", str(tmp_path / "two.safetensors"))
    one, two = (StatisticsFile.open(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert two.rows == one.rows
    assert two.inputs == one.inputs
    for name in one.layers:
        gram, expected = two.stats(name).gram, one.stats(name).gram
        assert (gram is None) == (expected is None)
        if gram is not None:
            torch.testing.assert_close(gram, expected, rtol=1e-4, atol=1e-5)


def test_two_processes_choose_the_widths_of_one(
    tmp_path: Path, tiny_llama: Path, text_file: Path, ranks: Ranks
) -> None:
    """Each measures half of the units on the same samples."""
    method = {"name": "rtn", "bits": "auto", "group_size": 16, "target_bpw": 4.5, "evaluations": 5}
    recipe = write_recipe(tmp_path, text(text_file), method=method)
    one = run(tiny_llama, tmp_path / "one", recipe)
    ranks.together(tiny_llama, tmp_path / "two", recipe)
    two = Report.from_json((tmp_path / "two" / "report.json").read_text())
    assert two.bits == one.bits
    assert two.after.sha256 == one.after.sha256
