"""Block tuning in a calibrated step: better outputs, resumed at blocks, refused where it cannot run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aicompress.errors import CompressError
from aicompress.model.blocks.moving_weights import TunableLayer, TuningSchedule
from aicompress.model.blocks.reconstruction import Stage, error, tune
from aicompress.pipeline.calibration.request import Request
from aicompress.pipeline.layerwise import block_tuning as tuned
from aicompress.pipeline.step.options import Options
from aicompress.weights import IntGrouped
from tests.pipeline.calibration.steps import planned, run, text, write_recipe

LOW = {"name": "gptq", "bits": 2, "group_size": 8}
TUNE = {"steps": 12, "batch": 2, "rate": 0.05}


@pytest.mark.parametrize("fixture", ["tiny_gpt2", "tiny_qwen_moe"])
def test_every_block_comes_nearer_to_its_outputs(
    tmp_path: Path, text_file: Path, fixture: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With layers stored (in, out), and experts merged into tensors, which keep their codes."""
    errors: list[tuple[float, float]] = []

    def watched(stage: Stage, layers: list[TunableLayer], pace: TuningSchedule, seed: int) -> list[IntGrouped]:
        weights = tune(stage, layers, pace, seed)
        errors.append((error(stage, layers, weights), error(stage, layers, [layer.weight for layer in layers])))
        return weights

    monkeypatch.setattr(tuned, "tune", watched)
    source: Path = request.getfixturevalue(fixture)
    exact = {**text(text_file, samples=4), "precision": "float32"}
    report = run(source, tmp_path / "out", write_recipe(tmp_path, exact, method=LOW, tune=TUNE))
    assert len(errors) >= 2
    assert all(after < before for after, before in errors)
    assert report.recipe["tune"]["steps"] == 12


@pytest.mark.parametrize("norms", [False, True])
def test_a_stopped_run_goes_on_with_the_same_result(
    tmp_path: Path, tiny_llama: Path, text_file: Path, norms: bool
) -> None:
    recipe = write_recipe(tmp_path, text(text_file, samples=4), method=LOW, tune={**TUNE, "norms": norms})
    run(tiny_llama, tmp_path / "whole", recipe)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_llama, tmp_path / "whole"))
    moved = {name for name, tensor in before.items() if tensor.ndim == 1 and not torch.equal(tensor, after[name])}
    blocks = {name for name, tensor in before.items() if tensor.ndim == 1 and ".layers." in name}
    assert moved == (blocks if norms else set())  # the final norm belongs to no block

    def stop(told: str, done: int, total: int) -> None:
        if told == "block 1 of 3":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_llama, tmp_path / "out", recipe, options=Options(latency="off", progress=stop))
    run(tiny_llama, tmp_path / "out", recipe, options=Options(True, "off"))
    digests = [
        hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest() for name in ("whole", "out")
    ]
    assert digests[0] == digests[1]


def refusal(source: Path, folder: Path, recipe: Path, request: Request | None = None) -> str:
    with pytest.raises(CompressError) as found:
        planned(source, folder / "out", recipe, request)
    assert found.value.exit_code == 2
    assert not (folder / "out").exists()
    return f"{found.value}; {found.value.hint}"


def test_what_cannot_be_tuned_is_refused_before_work(
    tmp_path: Path, tiny_llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: dict[str, Any] = {"name": "rtn", "bits": 4, "group_size": 16}
    assert "tune: rtn" in refusal(
        tiny_llama, tmp_path, write_recipe(tmp_path, text(text_file), method=plain, tune=TUNE)
    )
    recipe = write_recipe(tmp_path, text(text_file, samples=4), method=LOW, tune=TUNE)
    stats = Request(stats=(tmp_path / "stats.safetensors",))
    assert "tune: files of statistics" in refusal(tiny_llama, tmp_path, recipe, stats)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "tune: it runs in one process" in (told := refusal(tiny_llama, tmp_path, recipe))
    assert "leave torchrun out; or take effort: balanced" in told
    best = write_recipe(tmp_path, text(text_file, samples=4), method=LOW, effort="best")
    assert "or take effort: balanced" in refusal(tiny_llama, tmp_path, best)
