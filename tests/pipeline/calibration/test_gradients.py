"""Gradients of a step: what the loss is, through files and processes, and what comes out where there are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.statistics import StatisticsFile, merged_gradients
from aicompress.errors import Problems, RecipeError, Refused
from aicompress.pipeline.calibration.request import Request
from aicompress.pipeline.layerwise import planner
from aicompress.pipeline.layerwise import run as layerwise
from aicompress.pipeline.layerwise.plan import Plan
from aicompress.pipeline.step.output import Destination
from aicompress.recipe import load
from aicompress.report.model import Report
from scripts.sweep.configs import small_model
from tests.checkpoints import digits
from tests.pipeline.calibration.steps import OFF, text
from tests.pipeline.ranks import Ranks

TAYLOR = {"name": "taylor", "sparsity": 0.5}


def write_recipe(folder: Path, data: dict[str, Any] | None, **sections: Any) -> Path:
    path = folder / "recipe.yaml"
    calibration = {} if data is None else {"calibration": data}
    path.write_text(json.dumps({"version": 1, "method": TAYLOR, **calibration, **sections}))
    return path


def planned(source: Path, out: Path, recipe: Path, request: Request | None = None) -> Plan:
    return planner.make_plan(source, Destination(out), load(str(recipe), "prune"), "prune", request)


def run(source: Path, out: Path, recipe: Path, request: Request | None = None) -> Report:
    return layerwise.run(planned(source, out, recipe, request), OFF)


def zeros(folder: Path, name: str) -> float:
    return float((Checkpoint.open(folder).dense(name) == 0).float().mean())


def test_a_step_prunes_by_gradients_and_leaves_nothing_beside(
    tmp_path: Path, tiny_llama: Path, text_file: Path
) -> None:
    recipe = write_recipe(tmp_path, text(text_file))
    report = run(tiny_llama, tmp_path / "out", recipe)
    assert zeros(tmp_path / "out", "model.layers.0.mlp.up_proj.weight") == 0.5
    assert not any("data-free" in row.note for row in report.layers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yaml"]


def test_a_file_holds_the_gradients_of_the_step(tmp_path: Path, tiny_llama: Path, text_file: Path) -> None:
    """Without a refit nothing depends on the layers before, so that both ways give the same bytes."""
    recipe = write_recipe(tmp_path, text(text_file), method={**TAYLOR, "refit": False})
    path = tmp_path / "stats.safetensors"
    run(tiny_llama, tmp_path / "direct", recipe)
    run(tiny_llama, tmp_path / "filed", recipe, Request(stats=(path,)))
    run(tiny_llama, tmp_path / "read", write_recipe(tmp_path, None, method={**TAYLOR, "refit": False}),
        Request(stats=(path,)))  # fmt: skip
    direct = load_file(tmp_path / "direct" / "model.safetensors")
    for folder in ("filed", "read"):
        other = load_file(tmp_path / folder / "model.safetensors")
        assert all(torch.equal(direct[name], other[name]) for name in direct)
    file = StatisticsFile.open(path)
    moments = file.gradients("model.layers.0.mlp.up_proj")
    assert moments is not None
    assert moments.count == 8
    assert moments.mean.shape == (128, 64)
    assert (moments.square + 1e-12 >= moments.mean.square()).all()
    assert "gradients" in file.summary()["layers"][0]["statistics"]
    twice = merged_gradients([file, file], "model.layers.0.mlp.up_proj")
    assert twice is not None
    assert twice.count == 16
    torch.testing.assert_close(twice.square, moments.square)


def test_a_file_without_gradients_is_refused(tmp_path: Path, tiny_llama: Path, text_file: Path) -> None:
    path = tmp_path / "stats.safetensors"
    wanda = write_recipe(tmp_path, text(text_file), method={"name": "wanda", "sparsity": 0.5})
    run(tiny_llama, tmp_path / "out", wanda, Request(stats=(path,)))
    one = write_recipe(tmp_path, None, select={"include": ["model.layers.0.mlp.up_proj"]})
    with pytest.raises((Refused, Problems), match="no gradients of model"):
        planned(tiny_llama, tmp_path / "next", one, Request(stats=(path,)))


def test_two_processes_give_what_one_gives(tmp_path: Path, tiny_qwen_moe: Path, text_file: Path, ranks: Ranks) -> None:
    recipe = write_recipe(tmp_path, text(text_file, samples=3), method={**TAYLOR, "refit": False})
    run(tiny_qwen_moe, tmp_path / "one", recipe, Request(stats=(tmp_path / "one.safetensors",)))
    ranks.together(tiny_qwen_moe, tmp_path / "two", recipe, "--stats", str(tmp_path / "two.safetensors"), verb="prune")
    one, two = (StatisticsFile.open(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert two.samples == one.samples
    assert set(one.samples.values()) == {3}
    for name in one.samples:
        mine, other = one.gradients(name), two.gradients(name)
        assert mine is not None
        assert other is not None
        torch.testing.assert_close(other.mean, mine.mean, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(other.square, mine.square, rtol=1e-4, atol=1e-6)


def test_labels_of_arrays_are_the_task(tmp_path: Path, mlp_file: Path) -> None:
    """Wrong labels, so that the task's loss and the model's own are far apart."""
    images, labels = digits(40, seed=1)
    digits_npz = tmp_path / "digits.npz"
    np.savez(digits_npz, train_images=images, train_labels=(labels + 1) % 10)
    data = {"arrays": str(digits_npz), "inputs": "train_images", "scale": 255, "samples": 32}
    chain = {"sequential": ["flatten", "fc1", "relu", "fc2", "relu", "fc3"]}
    with pytest.raises((RecipeError, Problems), match="loss: task needs labels"):
        planned(mlp_file, tmp_path / "x.safetensors",
                write_recipe(tmp_path, data, model=chain, method={**TAYLOR, "loss": "task"}))  # fmt: skip
    recipe = write_recipe(tmp_path, {**data, "labels": "train_labels"}, model=chain, method={**TAYLOR, "loss": "task"})
    run(mlp_file, tmp_path / "task.safetensors", recipe)
    run(mlp_file, tmp_path / "own.safetensors", write_recipe(tmp_path, data, model=chain))
    task, own = (load_file(tmp_path / f"{name}.safetensors")["fc1.weight"] for name in ("task", "own"))
    assert float((task == 0).float().mean()) == 0.5
    assert not torch.equal(task == 0, own == 0)


def test_factors_have_gradients_of_their_own(tmp_path: Path, tiny_llama: Path, text_file: Path) -> None:
    factorized = tmp_path / "low-rank"
    svd = tmp_path / "svd.yaml"
    svd.write_text(json.dumps({"version": 1, "method": {"name": "svd", "rank": 8}}))
    layerwise.run(planner.make_plan(tiny_llama, Destination(factorized), load(str(svd), "factorize"), "factorize"), OFF)
    path = tmp_path / "stats.safetensors"
    run(factorized, tmp_path / "out", write_recipe(tmp_path, text(text_file)), Request(stats=(path,)))
    file = StatisticsFile.open(path)
    name = next(name for name in file.samples if name.endswith(".low_rank.out"))
    moments = file.gradients(name)
    assert moments is not None
    assert moments.square.max() > 0
    factor = next(info for info in Checkpoint.open(factorized).layers() if info.name == name)
    assert moments.mean.shape == factor.shape


def test_blocks_out_of_the_sight_of_autograd_are_refused(tmp_path: Path) -> None:
    """Reformer's layers are reversible: gradients are computed by code of its own."""
    small_model("reformer").save_pretrained(tmp_path / "in")
    save_file({"input_ids": torch.randint(3, 99, (4, 6))}, tmp_path / "ids.safetensors")
    recipe = write_recipe(tmp_path, {"arrays": str(tmp_path / "ids.safetensors"), "inputs": "input_ids"})
    with pytest.raises(Refused, match="no gradients in its weights"):
        run(tmp_path / "in", tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_losses_that_differ_are_refused(tmp_path: Path, tiny_llama: Path, text_file: Path) -> None:
    rules = [{"match": "*.down_proj", "loss": "own"}]
    with pytest.raises((RecipeError, Problems), match="gradients of losses"):
        planned(tiny_llama, tmp_path / "out", write_recipe(tmp_path, text(text_file), rules=rules))


def test_a_layer_without_gradient_is_pruned_by_magnitude_and_named(
    tmp_path: Path, tiny_mixtral: Path, text_file: Path
) -> None:
    """Two tokens reach few of the twelve experts of a block."""
    data = {"text": str(text_file), "samples": 1, "length": 2}
    report = run(tiny_mixtral, tmp_path / "out", write_recipe(tmp_path, data, method={**TAYLOR, "refit": False}))
    unreached = [row for row in report.layers if "no gradient reaches it" in row.note]
    assert unreached
    assert any("no gradient of the loss reaches" in line for line in report.warnings)
    checkpoint = Checkpoint.open(tmp_path / "out")
    before = Checkpoint.open(tiny_mixtral)
    name = f"{unreached[0].name}.weight"
    kept = checkpoint.dense(name) != 0
    assert before.dense(name).abs()[kept].min() >= before.dense(name).abs()[~kept].max()
