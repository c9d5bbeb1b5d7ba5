"""Movement: what training records, and what pruning makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.statistics import StatisticsFile
from aicompress.errors import CompressError, Problems, Refused
from aicompress.pipeline.calibration.request import Request
from aicompress.pipeline.distillation.loop.state import StateFile
from aicompress.pipeline.distillation.plan import make_plan
from aicompress.pipeline.distillation.run import TrainingOptions, run
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe.distillation import load
from tests.pipeline.calibration import test_gradients as prune


def recipe_of(folder: Path, text_file: Path, **training: Any) -> Path:
    settings = {"steps": 6, "batch": 8, "evaluate_every": 3, "learning_rate": 2e-3, "precision": "fp32", **training}
    plain = {"version": 1, "method": {"name": "kl"}, "data": {"text": str(text_file), "length": 32}}
    path = folder / "distill.yaml"
    path.write_text(json.dumps({**plain, "training": settings}))
    return path


def distil(student: Path, teacher: Path, out: Path, recipe: Path, resume: bool = False, **own: Any) -> None:
    plan = make_plan(student, teacher, Destination(out), load(str(recipe)))
    run(plan, Options(resume, "off"), TrainingOptions(**own))


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, trained_llama: Path, text_file: Path) -> Path:
    """A folder with a distilled checkpoint `out` and its movement."""
    folder = tmp_path_factory.mktemp("moved")
    recipe = recipe_of(folder, text_file)
    distil(tiny_llama, trained_llama, folder / "out", recipe, movement_file=folder / "movement.safetensors")
    return folder


def test_one_step_by_hand(tmp_path: Path, tiny_llama: Path, trained_llama: Path, text_file: Path) -> None:
    """After one step of plain AdamW without decay, w moved against g: -w g is positive where |w| grew."""
    recipe = recipe_of(tmp_path, text_file, steps=1, warmup=0.0, weight_decay=0.0, clip=None, learning_rate=1e-4,
                       evaluate_every=1)  # fmt: skip
    distil(tiny_llama, trained_llama, tmp_path / "out", recipe, movement_file=tmp_path / "movement.safetensors")
    file = StatisticsFile.open(tmp_path / "movement.safetensors")
    name = "model.layers.1.mlp.up_proj"
    before, after = (Checkpoint.open(p).dense(f"{name}.weight") for p in (tiny_llama, tmp_path / "out"))
    found = file.movement(name)
    assert found is not None
    assert file.steps[name] == 1
    changed = ((after.abs() - before.abs()).abs() > 5e-5) & (before.abs() > 1e-3)  # no sign has changed
    assert changed.float().mean() > 0.9
    assert torch.equal((found > 0)[changed], (after.abs() > before.abs())[changed])


def test_a_stopped_run_records_what_an_unbroken_one_does(
    tmp_path: Path, tiny_llama: Path, trained_llama: Path, text_file: Path, moved: Path, monkeypatch: Any
) -> None:
    recipe = recipe_of(tmp_path, text_file)
    save = StateFile.save

    def stop(self: StateFile, history: Any, tensors: Any) -> None:
        save(self, history, tensors)
        if history.step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(StateFile, "save", stop)
    stats = tmp_path / "movement.safetensors"
    with pytest.raises(KeyboardInterrupt):
        distil(tiny_llama, trained_llama, tmp_path / "out", recipe, movement_file=stats, save_seconds=0.0)
    monkeypatch.setattr(StateFile, "save", save)
    with pytest.raises(CompressError, match="did not record the same movement"):
        distil(tiny_llama, trained_llama, tmp_path / "out", recipe, resume=True)
    monkeypatch.setattr(StateFile, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        distil(tiny_llama, trained_llama, tmp_path / "again", recipe, movement_file=stats, save_seconds=0.0)
    monkeypatch.setattr(StateFile, "save", save)
    distil(tiny_llama, trained_llama, tmp_path / "again", recipe, movement_file=stats, resume=True)
    one, other = StatisticsFile.open(stats), StatisticsFile.open(moved / "movement.safetensors")
    for name in other.steps:
        mine, whole = one.movement(name), other.movement(name)
        assert mine is not None
        assert whole is not None
        assert torch.equal(mine, whole)


def test_what_moved_to_zero_goes(tmp_path: Path, moved: Path) -> None:
    recipe = prune.write_recipe(tmp_path, None, method={"name": "movement", "sparsity": 0.5})
    stats = moved / "movement.safetensors"
    report = prune.run(moved / "out", tmp_path / "out", recipe, Request(stats=(stats,)))
    assert not any("another checkpoint" in line for line in report.warnings)
    file = StatisticsFile.open(stats)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"):
        before, after = (Checkpoint.open(p).dense(f"{name}.weight") for p in (moved / "out", tmp_path / "out"))
        movement, kept = file.movement(name), after != 0
        assert movement is not None
        assert float(kept.float().mean()) == 0.5
        assert torch.equal(after[kept], before[kept])
        assert movement[kept].min() >= movement[~kept].max()
        assert before[~kept].abs().max() > before[kept].abs().min()


def test_without_a_record_it_is_refused(tmp_path: Path, tiny_llama: Path, text_file: Path) -> None:
    recipe = prune.write_recipe(tmp_path, None, method={"name": "movement", "sparsity": 0.5})
    with pytest.raises((Refused, Problems), match="reads what a training run has recorded"):
        prune.planned(tiny_llama, tmp_path / "out", recipe)
    wanda = prune.write_recipe(tmp_path, prune.text(text_file), method={"name": "wanda", "sparsity": 0.5})
    stats = Request(stats=(tmp_path / "stats.safetensors",))
    prune.run(tiny_llama, tmp_path / "wanda", wanda, stats)
    recipe = prune.write_recipe(tmp_path, None, method={"name": "movement", "sparsity": 0.5})
    with pytest.raises((Refused, Problems), match="no movement of"):
        prune.planned(tiny_llama, tmp_path / "out", recipe, stats)


def test_a_record_is_not_overwritten(
    tmp_path: Path, tiny_llama: Path, trained_llama: Path, text_file: Path, moved: Path
) -> None:
    with pytest.raises(Refused, match="exists"):
        distil(tiny_llama, trained_llama, tmp_path / "out", recipe_of(tmp_path, text_file),
               movement_file=moved / "movement.safetensors")  # fmt: skip
    assert not (tmp_path / "out").exists()
