"""What a dry run prints of its survey, and that the run that follows takes it up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.pipeline.calibration.steps import text

Call = Callable[..., tuple[int, str, str]]


def recipe(folder: Path, data: dict[str, Any], **method: Any) -> Path:
    path = folder / "prune.yaml"
    path.write_text(json.dumps({"version": 1, "method": method, "calibration": data}))
    return path


def test_a_dry_run_says_what_it_measured_and_the_run_measures_nothing(
    tmp_path: Path, tiny_llama: Path, text_file: Path, cache: Path, call: Call
) -> None:
    path = recipe(tmp_path, text(text_file), name="depth", drop_layers=1, strategy="influence")
    step = ("prune", tiny_llama, tmp_path / "out", "-r", path, "--latency", "off")
    code, printed, _ = call(*step, "--dry-run")
    assert code == 0
    assert "survey: influence of 3 blocks, 2 of which stay (kept for the run)" in printed.splitlines()
    assert len(list(cache.rglob("*.safetensors"))) == 1
    code, printed, _ = call(*step, "--dry-run", "--json")
    assert json.loads(printed)["survey"] == ["influence of 3 blocks, 2 of which stay (measured by an earlier dry run)"]
    assert call(*step)[0] == 0
    assert list(cache.rglob("*.safetensors")) == []


def test_a_dry_run_that_reads_headers_alone_says_nothing_of_it(
    tmp_path: Path, tiny_mixtral: Path, text_file: Path, cache: Path, call: Call
) -> None:
    """Which experts stay is for the run to choose: no byte count depends on it."""
    path = recipe(tmp_path, text(text_file), name="experts", experts=6)
    step = ("prune", tiny_mixtral, tmp_path / "out", "-r", path, "--latency", "off", "--json")
    code, printed, _ = call(*step, "--dry-run")
    plan = json.loads(printed)
    assert (code, plan["survey"]) == (0, [])
    assert list(cache.rglob("*")) == []
    assert "model.layers.0: the run chooses the 6 of 12 experts that stay" in plan["notes"]
    assert not any("experts.3." in row["name"] for row in plan["rows"])
    code, printed, _ = call(*step)
    report = json.loads(printed)
    assert code == 0
    assert report["after"]["weight_bytes"] == plan["weight_bytes"]
    assert any("kept experts" in line for line in report["notes"])
