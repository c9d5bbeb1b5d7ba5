"""Samples that a model's forward cannot take are refused in a plan, with what it takes and what the data holds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aicompress.errors import Problems, Refused
from aicompress.pipeline.distillation.plan import make_plan
from aicompress.pipeline.evaluation.run import evaluate
from aicompress.pipeline.step.output import Destination
from aicompress.recipe import distillation, evaluation
from tests import checkpoints
from tests.pipeline.calibration.steps import GPTQ, planned, write_recipe

MLP = {"model": {"sequential": ["flatten", "fc1", "relu", "fc2", "relu", "fc3"]}}
TOKENS = r"takes token ids \(input_ids\).*and arrays.npz holds "
IMAGES = r"takes images \(pixel_values\), such as \(samples, 1, 28, 28\), and "
# model, name of the arrays, what is said
CASES = [
    ("tiny_llama", "images", TOKENS + r"real numbers \(24, 28, 28\)"),
    ("tiny_llama", "late", r"has 256 tokens, and arrays.npz holds token 300"),
    ("tiny_llama", "negative", r"has 256 tokens, and arrays.npz holds token -1"),
    ("tiny_llama", "long", r"takes 256 positions, and arrays.npz holds token ids \(24, 257\)"),
    ("tiny_bert", "images", TOKENS + r"real numbers \(24, 28, 28\)"),
    ("tiny_vit", "tokens", IMAGES + r"arrays.npz holds token ids \(24, 16\)"),
    ("tiny_vit", "small", IMAGES + r"arrays.npz holds real numbers \(24, 14, 14\)"),
    ("tiny_vit", "colours", IMAGES + r"arrays.npz holds real numbers \(24, 3, 28, 28\)"),
    ("mlp_file", "small", r"does not run on real numbers \(24, 14, 14\) of arrays.npz: .*196"),
]


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of arrays, 24 samples each, that some models take and others do not."""
    path = tmp_path_factory.mktemp("arrays") / "arrays.npz"
    tokens = np.arange(24 * 16).reshape(24, 16) % 200
    shapes = {"images": (28, 28), "small": (14, 14), "colours": (3, 28, 28)}
    whole = {"tokens": tokens, "late": tokens + 101, "negative": tokens - 1, "long": np.ones((24, 257), np.int64)}
    images = {name: np.ones((24, *shape), np.uint8) for name, shape in shapes.items()}
    np.savez(path, **images, **whole, labels=np.arange(24) % 2)
    return str(path)


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    return request.getfixturevalue


@pytest.mark.parametrize(("model", "inputs", "told"), CASES)
class TestEveryUserOfData:
    """Distillation, for student and teacher, calibration and evaluation refuse the same samples."""

    def test_distillation(
        self, checkpoint: Callable[[str], Path], arrays: str, model: str, inputs: str, told: str, tmp_path: Path
    ) -> None:
        loss = {"name": "hidden"} if model == "tiny_bert" else {"name": "kl"}
        data = {"arrays": arrays, "inputs": inputs}
        who = "the student " if model == "mlp_file" else r"the student's \w+ "
        refused(who + told, lambda: distilled(checkpoint(model), checkpoint(model), data, loss, tmp_path))

    def test_calibration(
        self, checkpoint: Callable[[str], Path], arrays: str, model: str, inputs: str, told: str, tmp_path: Path
    ) -> None:
        sections = MLP if model == "mlp_file" else {}
        recipe = write_recipe(tmp_path, {"arrays": arrays, "inputs": inputs}, **sections)
        out = tmp_path / ("out.safetensors" if model == "mlp_file" else "out")
        refused(told, lambda: planned(checkpoint(model), out, recipe))

    def test_evaluation(
        self, checkpoint: Callable[[str], Path], arrays: str, model: str, inputs: str, told: str, tmp_path: Path
    ) -> None:
        section = {"arrays": arrays, "inputs": inputs, "labels": "labels"}
        sections = MLP if model == "mlp_file" else {}
        refused(told, lambda: measured(checkpoint(model), {"accuracy": section}, sections, tmp_path))


def refused(told: str, act: Callable[[], object]) -> None:
    with pytest.raises(Refused) as caught:
        act()
    problems = caught.value.problems if isinstance(caught.value, Problems) else (caught.value,)
    (problem,) = (each for each in problems if re.search(told, each.message))  # gptq has its own of other layers
    assert problem.hint
    assert problem.exit_code == 2


def distilled(student: Path, teacher: Path, data: dict[str, Any], loss: dict[str, Any], folder: Path) -> object:
    single = student.suffix == ".safetensors"
    training = {"batch": 4, "steps": 2}
    plain = {"version": 1, "method": loss, "data": data, "training": training, **(MLP if single else {})}
    (folder / "recipe.yaml").write_text(json.dumps(plain))
    out = folder / ("out.safetensors" if single else "out")
    return make_plan(student, teacher, Destination(out), distillation.load(str(folder / "recipe.yaml")))


def measured(model: Path, quality: dict[str, Any], sections: dict[str, Any], folder: Path) -> object:
    (folder / "recipe.yaml").write_text(json.dumps({"version": 1, "quality": quality, **sections}))
    return evaluate(str(model), [], evaluation.load(str(folder / "recipe.yaml")))


def test_a_teacher_of_other_inputs(tiny_vit: Path, arrays: str, tmp_path: Path) -> None:
    small = checkpoints.make_vit(tmp_path / "small", image_size=14)
    with pytest.raises(Refused, match="the teacher's ViTForImageClassification " + IMAGES) as caught:
        distilled(small, tiny_vit, {"arrays": arrays, "inputs": "small"}, {"name": "kl"}, tmp_path)
    assert "arrays" in caught.value.hint


def test_texts_for_a_model_of_images(tiny_vit: Path, text_file: Path, tmp_path: Path) -> None:
    told = IMAGES.replace(", and ", "") + ", and text.txt holds text"
    refused(told, lambda: distilled(tiny_vit, tiny_vit, {"text": str(text_file)}, {"name": "kl"}, tmp_path))
    refused(told, lambda: measured(tiny_vit, {"perplexity": {"text": str(text_file), "length": 16}}, {}, tmp_path))


def test_what_fits_is_planned(tiny_vit: Path, tiny_llama: Path, mlp_file: Path, arrays: str, tmp_path: Path) -> None:
    for model, inputs in ((tiny_vit, "images"), (tiny_llama, "tokens"), (mlp_file, "images")):
        distilled(model, model, {"arrays": arrays, "inputs": inputs}, {"name": "kl"}, tmp_path)


def test_token_ids_alone_calibrate_a_mixture(arrays: str, tiny_qwen_moe: Path, tmp_path: Path) -> None:
    """What transformers multiplies experts with takes no float32 on the meta device."""
    recipe = write_recipe(tmp_path, {"arrays": arrays, "inputs": "tokens"}, method={**GPTQ, "group_size": 8})
    assert planned(tiny_qwen_moe, tmp_path / "out", recipe).layers
