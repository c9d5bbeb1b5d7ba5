"""Every shipped recipe of distill, run on the smallest models that it is for; every loss and mode has one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from typer.testing import CliRunner

from aicompress import recipe
from aicompress.cli.app import app
from aicompress.layer import LayerInfo
from aicompress.methods import methods
from aicompress.methods.modes import modes
from aicompress.pipeline.distillation import temperature
from aicompress.recipe.distillation import load
from aicompress.report.model import Report
from aicompress.weights import Weight
from tests import checkpoints
from tests.model.compressed import compress, halved, integers, low_rank

FOLDER = recipe.shipped() / "distill"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
SHORT = {"training.steps": 1, "training.batch": 4, "training.evaluate_every": 1, "training.precision": "fp32"}
ARRAYS = {"dkd", "epr", "mean-teacher", "mlp-labels"}
ENCODERS = {"attention", "embedding", "embedding-relation"}
OWN: dict[str, dict[str, Any]] = {
    "blocks": {"mode.samples": 8, "mode.steps": 1},
    "iterate": {"iterate.sparsity": "[0.3, 0.5]"},
    "kl-stored": {"signals.k": 8},
    "student-config": {"student.config": "student.json"},
}


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of two narrow blocks."""
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    return checkpoints.make_llama(tmp_path_factory.mktemp("small") / "llama", **shape)


@pytest.fixture(scope="module")
def small_healed(small_llama: Path) -> Path:
    """The same with codes, factors and masks, as earlier steps leave it."""

    def pick(info: LayerInfo, matrix: Tensor) -> Weight | None:
        if info.kind != "linear":
            return None
        if "self_attn" in info.name:
            return low_rank(matrix, 8)
        return halved(matrix) if "down_proj" in info.name else integers(matrix, 4, 16)

    return compress(small_llama, small_llama.parent / "student", pick)


@pytest.fixture(scope="module")
def classifier(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of three kinds of sentences."""
    folder = tmp_path_factory.mktemp("classifier") / "bert"
    shutil.copytree(tiny_bert, folder)
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(hf.BertConfig.from_pretrained(tiny_bert, num_labels=3))
    model.save_pretrained(folder)
    return folder


def test_every_loss_and_mode_has_a_recipe() -> None:
    loaded = [load(f"distill/{name}") for name in NAMES]
    assert {config.name for each in loaded for config in each.losses} == set(methods("distill"))
    assert {each.mode.name for each in loaded} == set(modes())
    assert all((FOLDER / f"{name}.yaml").read_text(encoding="utf-8").startswith("# ") for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs(
    name: str, request: pytest.FixtureRequest, text_file: Path, digits_npz: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(temperature, "CANDIDATES", (1.0, 2.0))
    monkeypatch.setattr(temperature, "STEPS", 1)
    settings = {**SHORT, **OWN.get(name, {}), "report.html": "false"}
    if name in ARRAYS:
        settings |= {"data.arrays": digits_npz, "data.samples": 40}
        student = teacher = request.getfixturevalue("mlp_file")
    else:
        settings |= {"data.text": text_file, "data.length": 12, "data.samples": 20}
        kind = "tiny_bert" if name in ENCODERS else "classifier" if name == "mse" else "small_llama"
        teacher = request.getfixturevalue(kind)
        student = request.getfixturevalue("small_healed") if kind == "small_llama" else teacher
    if name.startswith("student-"):
        student = teacher
        small = {**json.loads((teacher / "config.json").read_text()), "num_hidden_layers": 1}
        (tmp_path / "student.json").write_text(json.dumps(small))
        settings |= {"student.config": tmp_path / "student.json"} if "student.config" in settings else {}
    if name == "iterate":
        student = teacher
    out = tmp_path / ("out.safetensors" if name in ARRAYS else "out")
    given = [f"--set={key}={value}" for key, value in settings.items()]
    given += [] if name == "mean-teacher" else ["--teacher", str(teacher)]
    given += ["--cache-teacher", str(tmp_path / "cache")] if name == "kl-stored" else []
    call = ["distill", str(student), str(out), "-r", f"distill/{name}", "--latency", "off", "--quiet", *given]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    path = out.with_suffix(".report.json") if name in ARRAYS else out / "report.json"
    training = Report.from_json(path.read_text(encoding="utf-8")).training
    assert training["held_out_before"] < float("inf")
    assert training["curve"][-1]["step"] == training["best_step"] or name != "epr"  # its last step is kept
    assert training["held_out_after"] <= training["held_out_before"] or name == "epr"
