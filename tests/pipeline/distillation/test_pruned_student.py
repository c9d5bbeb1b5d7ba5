"""Pruning and training in turn, as the command line does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from aicompress.checkpoint import Checkpoint
from aicompress.cli.app import app
from aicompress.errors import RecipeError, Refused
from aicompress.pipeline.distillation.plan import make_plan
from aicompress.pipeline.distillation.pruned_student import Teaching, pruned_student
from aicompress.pipeline.distillation.run import run
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe.distillation import DistillRecipe, load
from aicompress.report.model import Report


def written(folder: Path, data: Path, **sections: Any) -> str:
    plain = {
        "version": 1,
        "mode": "masked",
        "iterate": [0.2, 0.4],
        "method": {"name": "mse"},
        "model": {"sequential": ["flatten", "fc1", "relu", "fc2", "relu", "fc3"]},
        "data": {"arrays": str(data), "inputs": "train_images", "scale": 255},
        "training": {"steps": 4, "batch": 16, "evaluate_every": 2, "learning_rate": 1e-3, "precision": "fp32"},
        "report": {"html": False},
        **sections,
    }
    path = folder / "recipe.json"
    path.write_text(json.dumps(plain))
    return str(path)


def test_zeros_grow_from_round_to_round(mlp_file: Path, digits_npz: Path, tmp_path: Path) -> None:
    recipe, out = written(tmp_path, digits_npz), tmp_path / "out.safetensors"
    call = ["distill", str(mlp_file), str(out), "-r", recipe, "--latency", "off"]
    planned = CliRunner().invoke(app, [*call, "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.json"}
    done = CliRunner().invoke(app, [*call, "--quiet"])
    assert done.exit_code == 0, done.output
    checkpoint = Checkpoint.open(out)
    assert [step["command"] for step in checkpoint.manifest.lineage] == ["prune", "distill", "prune", "distill"]
    assert [step["recipe"]["method"].get("sparsity") for step in checkpoint.manifest.lineage] == [0.2, None, 0.4, None]
    zeros = float((checkpoint.read("fc1.weight") == 0).float().mean())
    assert zeros == pytest.approx(0.4, abs=0.01)
    report = Report.from_json((tmp_path / "out.report.json").read_text(encoding="utf-8"))
    assert any(note.startswith("round 1: sparsity 0.2, held-out loss ") for note in report.notes)
    assert report.training["held_out_after"] < report.training["held_out_before"]
    assert not [path for path in tmp_path.iterdir() if "rounds" in path.name]


def test_rounds_that_are_done_are_not_done_again(mlp_file: Path, digits_npz: Path, tmp_path: Path) -> None:
    asked = load(written(tmp_path, digits_npz, iterate=[0.2, 0.3, 0.4]))
    trained: list[str] = []  # what was said of every step of training

    def distil(out: Path, recipe: DistillRecipe, until: int = 99, resume: bool = False) -> None:
        def progress(what: str, done: int, total: int) -> None:
            trained.extend([what] if what.startswith("loss") else [])
            if len(trained) == until:
                raise KeyboardInterrupt

        trained.clear()
        options = Options(resume, "off", progress)
        with pruned_student(mlp_file, Destination(out), recipe, Teaching([mlp_file]), options) as pruned:
            assert pruned is not None
            run(make_plan(pruned, [mlp_file], Destination(out), recipe), options)

    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    distil(whole, asked)
    assert len(trained) == 3 * 4
    with pytest.raises(KeyboardInterrupt):
        distil(out, asked, until=5)  # the first step of the second round
    (journal,) = tmp_path.glob(".*/rounds.jsonl")
    other = load(written(tmp_path, digits_npz, iterate=[0.2, 0.3, 0.5]))
    with pytest.raises(Refused, match="another input, recipe or version"):
        distil(out, other, resume=True)
    with journal.open("a") as file:
        file.write('{"parame')  # as a kill leaves it
    with pytest.raises(KeyboardInterrupt):
        distil(out, asked, until=5, resume=True)  # the first step of the last round
    distil(out, asked, resume=True)
    assert len(trained) == 4
    assert out.read_bytes() == whole.read_bytes()
    assert not journal.parent.exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"iterate": [0.5, 0.3]}, "each above the one before"),
        ({"iterate": {"sparsity": [0.5], "prune": {"name": "depth"}}}, "depth makes no zeros of single weights"),
        (
            {"iterate": {"sparsity": [0.5], "prune": {"name": "magnitude", "scoop": 1}}},
            r"iterate\.prune\.scoop: unknown",
        ),
        ({"student": {"layers": 1}}, "leave out student and mean_teacher"),
    ],
)
def test_what_is_wrong_is_said(digits_npz: Path, tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(written(tmp_path, digits_npz, **sections))
