"""A student that learns from few labels and from its own average: what it reaches, what is saved, what is drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aicompress.checkpoint import Checkpoint
from aicompress.errors import RecipeError, Refused
from aicompress.model.distillation.outputs import Runner
from aicompress.model.distillation.training_passes import Noise
from aicompress.model.loading.pooling import Pooling
from aicompress.pipeline.distillation.data.splits import MixedSplit, Split, mixed
from aicompress.pipeline.distillation.plan import make_plan
from aicompress.pipeline.distillation.run import TrainingOptions, run
from aicompress.pipeline.distillation.teachers.mean_teacher import Averaged
from aicompress.pipeline.distillation.teachers.teacher import Runnable
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe.distillation import DistillRecipe, MeanTeacher, load
from aicompress.report.model import Report

Make = Callable[..., DistillRecipe]
LABELLED = 20
NOISE = {"noise": 0.15, "dropout": 0, "decay": 0.95, "labelled": 0.125}


def moons(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two half circles that reach into one another: (count, 2) points, and which they lie on."""
    generator = torch.Generator().manual_seed(seed)
    which, angle = torch.arange(count) % 2, torch.rand(count, generator=generator) * torch.pi
    upper = torch.stack([torch.cos(angle) - 0.5, torch.sin(angle) - 0.25], dim=1)
    points = torch.where(which[:, None] == 0, upper, -upper)
    return points + 0.1 * torch.randn(count, 2, generator=generator), which


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random network of three layers in a bare file, with few of four hundred points labelled beside it."""
    folder = tmp_path_factory.mktemp("moons")
    torch.manual_seed(0)
    layers = {"fc1": nn.Linear(2, 48), "fc2": nn.Linear(48, 48), "fc3": nn.Linear(48, 2)}
    save_file(
        {f"{n}.{p}": t.detach() for n, m in layers.items() for p, t in m.named_parameters()}, folder / "n.safetensors"
    )
    points, which = moons(400, 0)
    few = which.where(torch.arange(400) < LABELLED, torch.tensor(-1))
    np.savez(folder / "points.npz", points=points.numpy(), which=few.numpy(), none=np.full(400, -1))
    return folder / "n.safetensors"


@pytest.fixture
def recipe(tmp_path: Path, network: Path) -> Make:
    """Recipes of a mean teacher on the points."""

    def make(weight: float = 1.0, steps: int = 6, labels: str | None = "which", **average: Any) -> DistillRecipe:
        data = {"arrays": str(network.with_name("points.npz")), "inputs": "points"}
        plain = {
            "version": 1,
            "method": {"name": "consistency", "weight": weight},
            "mean_teacher": {**NOISE, **average},
            "model": {"sequential": ["fc1", "relu", "fc2", "relu", "fc3"]},
            "data": {**data, "labels": labels} if labels else data,
            "training": {
                "steps": steps, "batch": 32, "evaluate_every": steps // 2, "learning_rate": 1e-2, "precision": "fp32",
                "held_out": 0.2, "accumulate": 2 if steps < 10 else 1,
            },
        }  # fmt: skip
        (tmp_path / "recipe.yaml").write_text(json.dumps(plain))
        return load(str(tmp_path / "recipe.yaml"))

    return make


def learn(network: Path, out: Path, made: DistillRecipe, save_seconds: float = 60.0, **options: Any) -> Report:
    plan = make_plan(network, None, Destination(out), made)
    return run(plan, Options(**{"latency": "off", **options}), TrainingOptions(save_seconds))


def accuracy(path: Path) -> float:
    """Share of other points that a written network puts on the right half circle."""
    tensors, (points, which) = load_file(path), moons(1000, 1)
    for name in ("fc1", "fc2", "fc3"):
        points = points @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]
        points = points if name == "fc3" else points.relu()
    return float((points.argmax(dim=1) == which).float().mean())


def test_few_labels_with_consistency_beat_few_labels_alone(network: Path, recipe: Make, tmp_path: Path) -> None:
    learn(network, tmp_path / "alone.safetensors", recipe(weight=1e-9, steps=120))
    report = learn(network, tmp_path / "both.safetensors", recipe(weight=1.0, steps=120))
    alone, both = (accuracy(tmp_path / f"{name}.safetensors") for name in ("alone", "both"))
    assert both > alone + 0.04
    assert report.training["loss"] == "1 cross-entropy + 1 consistency"
    assert report.training["teacher"]["average_of_the_student"]["decay"] == 0.95
    assert "the teacher is the average of the student's weights, and the average is what is saved" in report.notes
    (step,) = Checkpoint.open(tmp_path / "both.safetensors").manifest.lineage
    assert "teacher" not in step


def test_a_stopped_run_goes_on_to_the_same_bytes(network: Path, recipe: Make, tmp_path: Path) -> None:
    made = recipe(dropout=0.2)

    def stop(what: str, done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    learn(network, tmp_path / "whole.safetensors", made)
    with pytest.raises(KeyboardInterrupt):
        learn(network, tmp_path / "stopped.safetensors", made, save_seconds=0, progress=stop)
    steps: list[int] = []
    learn(network, tmp_path / "stopped.safetensors", made, resume=True, progress=lambda what, n, total: steps.append(n))
    assert steps == [5, 6]
    one, other = (tmp_path / f"{name}.safetensors" for name in ("whole", "stopped"))
    assert one.read_bytes() == other.read_bytes()


def test_a_language_model_learns_from_the_next_tokens(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    plain = {
        "version": 1,
        "method": {"name": "consistency"},
        "mean_teacher": {"dropout": 0.1},
        "data": {"text": str(text_file), "length": 32},
        "training": {"steps": 4, "batch": 8, "evaluate_every": 4, "learning_rate": 2e-3, "precision": "fp32"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(plain))
    report = learn(tiny_llama, tmp_path / "out", load(str(tmp_path / "recipe.yaml")))
    assert report.training["held_out_after"] < report.training["held_out_before"]


def test_the_average_starts_as_a_mean_and_then_follows_slowly() -> None:
    averaged = Averaged(
        MeanTeacher(decay=0.75), 0, Runnable(nn.Identity(), Runner("module", Pooling())), {"w": torch.tensor([8.0])}
    )
    for step, (student, expected) in enumerate([(4.0, 6.0), (3.0, 5.0), (1.0, 4.0), (0.0, 3.0), (0.0, 2.25)]):
        averaged.follow({"w": torch.tensor([student])}, step)
        assert float(averaged.parameters["w"]) == pytest.approx(expected)


def test_noise_is_the_seeds_alone_and_leaves_the_model_as_it_was() -> None:
    model, inputs = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), {"": torch.randn(4, 8)}
    noise, plain = Noise(dropout=0.5, inputs=0.1), model(inputs[""])
    state = torch.get_rng_state()
    outputs = []
    for seed in (1, 1, 2):
        with noise.on(model, inputs, seed) as given:
            outputs.append(model(given[""]))
    assert outputs[0].equal(outputs[1])
    assert not outputs[0].equal(outputs[2])
    assert model(inputs[""]).equal(plain)
    assert torch.get_rng_state().equal(state)


def test_every_batch_holds_its_share_of_labelled_samples() -> None:
    labels = torch.full((100,), -1)
    labels[::10] = 1
    split = Split(torch.arange(0, 80), torch.arange(80, 100), batch=8, seed=3)
    halves = mixed(split, labels, 0.25)
    assert isinstance(halves, MixedSplit)
    for step in range(30):
        index = halves.at(step)
        assert len(index) == 8
        assert (labels[index] >= 0).tolist() == [True] * 2 + [False] * 6
        assert set(index.tolist()) <= set(halves.used(step + 1).tolist()) <= set(range(80))
    assert halves.held_out.tolist() == [80, 90]
    assert mixed(split, labels.clamp(min=0), 0.25) is split


class TestRefused:
    """What a mean teacher cannot be is said before any work."""

    def test_another_teacher_beside_it(self, network: Path, recipe: Make, tmp_path: Path) -> None:
        with pytest.raises(Refused, match="mean_teacher is the teacher: another one is given"):
            make_plan(network, network, Destination(tmp_path / "out.safetensors"), recipe())

    @pytest.mark.parametrize(("labels", "message"), [(None, "the data has none"), ("none", "labels go from -1 to -1")])
    def test_data_without_labels(
        self, network: Path, recipe: Make, tmp_path: Path, labels: str | None, message: str
    ) -> None:
        with pytest.raises(RecipeError, match=message):
            make_plan(network, None, Destination(tmp_path / "out.safetensors"), recipe(labels=labels))

    def test_an_encoder(self, tiny_bert: Path, text_file: Path, tmp_path: Path) -> None:
        plain = {"method": {"name": "embedding"}, "mean_teacher": {}, "data": {"text": str(text_file), "length": 32}}
        (tmp_path / "recipe.yaml").write_text(json.dumps({"version": 1, **plain}))
        with pytest.raises(Refused, match="classifiers and causal language models"):
            make_plan(tiny_bert, None, Destination(tmp_path / "out"), load(str(tmp_path / "recipe.yaml")))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"dropout": 0, "noise": 0}, "one of dropout and noise must be above 0"),
            ({"labelled": 1.0}, "mean_teacher.labelled"),
        ],
    )
    def test_settings_that_say_nothing(self, recipe: Make, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            recipe(**fields)
