"""The survey: a dry run measures, the run that follows takes the result up, and nothing else does."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aicompress.checkpoint import Checkpoint
from aicompress.pipeline import steps
from aicompress.pipeline.calibration.request import Request
from aicompress.pipeline.step.options import Options, Progress
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.step.survey import Survey, SurveyResult
from aicompress.recipe import Recipe, load
from tests.pipeline.calibration.steps import text

if TYPE_CHECKING:
    Steps = Callable[..., steps.Planned]

INFLUENCE = {"name": "depth", "drop_layers": 1, "strategy": "influence"}


def kept(cache: Path) -> list[Path]:
    """Files that dry runs have kept."""
    return sorted(cache.rglob("*.safetensors"))


def recipe(folder: Path, data: dict[str, Any], **method: Any) -> Path:
    path = folder / "prune.yaml"
    path.write_text(json.dumps({"version": 1, "method": {**INFLUENCE, **method}, "calibration": data}))
    return path


def planned(source: Path, out: Path, path: Path, keep: bool) -> steps.Planned:
    request = Request(survey=Survey(keep=keep))
    return steps.make_plan(source, Destination(out), load(str(path), "prune"), "prune", request)


@pytest.fixture
def measurement(tmp_path: Path, tiny_llama: Path, text_file: Path) -> Callable[..., int]:
    """Ask a survey for the same measurement again; how often it has been made."""
    made: list[str] = []
    checkpoint = Checkpoint.open(tiny_llama)
    asked: Recipe = load(str(recipe(tmp_path, text(text_file))), "prune")

    def measure(progress: Progress) -> SurveyResult:
        made.append("once")
        progress("part", 1, 2)
        return SurveyResult({"scores": torch.arange(3.0)}, {"data": [{"samples": 8}], "processes": 1})

    def ask(survey: Survey, what: str = "scores of 3 blocks") -> int:
        found = survey.recorded(what, checkpoint, asked, measure)
        assert found.tensors["scores"].tolist() == [0, 1, 2]
        assert found.record == {"data": [{"samples": 8}], "processes": 1}
        return len(made)

    return ask


def test_a_dry_run_keeps_and_the_run_uses_up(measurement: Callable[..., int], cache: Path) -> None:
    assert measurement(Survey(keep=True)) == 1
    assert measurement(Survey(keep=True)) == 1  # another dry run
    assert len(kept(cache)) == 1
    assert measurement(Survey()) == 1  # the run
    assert kept(cache) == []
    assert measurement(Survey()) == 2  # another run
    assert kept(cache) == []
    assert measurement(Survey(keep=True), "scores of 4 blocks") == 3


def test_it_says_what_it_measured(measurement: Callable[..., int]) -> None:
    told: list[str] = []
    first, second, run = Survey(True, lambda what, done, total: told.append(what)), Survey(True), Survey()
    for survey in (first, second, run):
        measurement(survey)
    assert told == ["survey: scores of 3 blocks: part", "survey: scores of 3 blocks"]
    assert first.measured == ["scores of 3 blocks (kept for the run)"]
    assert second.measured == run.measured == ["scores of 3 blocks (measured by an earlier dry run)"]


def test_a_damaged_file_is_measured_anew(measurement: Callable[..., int], cache: Path) -> None:
    measurement(Survey(keep=True))
    kept(cache)[0].write_bytes(b"\x08")
    assert measurement(Survey(keep=True)) == 2
    assert measurement(Survey()) == 2


def test_a_cache_that_cannot_be_written_costs_the_run_a_measurement(
    measurement: Callable[..., int], cache: Path
) -> None:
    cache.mkdir(parents=True)
    (cache / "aicompress").write_text("a file where the folder should be")
    survey = Survey(keep=True)
    assert measurement(survey) == 1
    assert survey.measured == ["scores of 3 blocks"]
    assert measurement(Survey()) == 2


def test_a_run_takes_up_what_the_dry_run_measured(
    tmp_path: Path, tiny_llama: Path, text_file: Path, cache: Path
) -> None:
    """The kept scores are replaced by others: the run goes by them."""
    path = recipe(tmp_path, text(text_file))
    summary = planned(tiny_llama, tmp_path / "out", path, keep=True).summary()
    assert summary.survey == ("influence of 3 blocks, 2 of which stay (kept for the run)",)
    (file,) = kept(cache)
    scores = load_file(file)["importance.0"]
    other = int(scores.argsort()[1])
    save_file({"importance.0": torch.ones_like(scores).index_fill_(0, torch.tensor(other), 0)}, file)
    report = steps.run(planned(tiny_llama, tmp_path / "out", path, keep=False), Options(latency="off"))
    assert any(f"dropped block {other} of 3" in line for line in report.notes)
    assert kept(cache) == []


def test_a_run_after_a_dry_run_writes_what_it_would_have_written(
    tmp_path: Path, tiny_llama: Path, text_file: Path, cache: Path
) -> None:
    path = recipe(tmp_path, text(text_file))
    alone = steps.run(planned(tiny_llama, tmp_path / "alone", path, keep=False), Options(latency="off"))
    assert kept(cache) == []
    dry = planned(tiny_llama, tmp_path / "out", path, keep=True).summary()
    after = steps.run(planned(tiny_llama, tmp_path / "out", path, keep=False), Options(latency="off"))
    assert after.after.sha256 == alone.after.sha256
    assert after.calibration == alone.calibration
    assert dry.weight_bytes == after.after.weight_bytes


@pytest.mark.parametrize("change", ["recipe", "input", "data"])
def test_what_has_changed_is_measured_again(
    tmp_path: Path, tiny_llama: Path, text_file: Path, cache: Path, change: str
) -> None:
    source, lines = tmp_path / "in", tmp_path / "text.txt"
    source.mkdir()
    for file in tiny_llama.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    lines.write_text(text_file.read_text())
    path = recipe(tmp_path, text(lines))
    planned(source, tmp_path / "out", path, keep=True)
    if change == "recipe":
        path = recipe(tmp_path, text(lines, 4))
    elif change == "data":
        lines.write_text(lines.read_text().upper())
    else:
        weights = source / "model.safetensors"
        os.utime(weights, ns=(1, weights.stat().st_mtime_ns + 1))
    again = planned(source, tmp_path / "out", path, keep=True)
    assert again.summary().survey == ("influence of 3 blocks, 2 of which stay (kept for the run)",)
    assert len(kept(cache)) == 2
