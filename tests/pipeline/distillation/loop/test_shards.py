"""Training with weights, gradients and moments divided over two processes: what one process learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aicompress.checkpoint import Checkpoint
from aicompress.errors import RecipeError
from aicompress.layer import LayerInfo
from aicompress.pipeline.distillation.plan import make_plan
from aicompress.pipeline.distillation.run import TrainingOptions, run
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe.distillation import load
from aicompress.weights import Weight
from tests.model.compressed import compress, integers, low_rank
from tests.pipeline.ranks import Ranks


def _pick(info: LayerInfo, matrix: torch.Tensor) -> Weight | None:
    if info.kind != "linear":
        return None
    return low_rank(matrix, 8) if "mlp" in info.name else integers(matrix, 4, 16)


def _recipe(path: Path, text: Path, training: dict[str, Any], **sections: Any) -> Path:
    settings = {"steps": 3, "batch": 8, "evaluate_every": 3, "learning_rate": 1e-3, "precision": "fp32", **training}
    data = {"text": str(text), "length": 32}
    plain = {"version": 1, "method": {"name": "kl"}, "data": data, "training": settings, **sections}
    path.write_text(json.dumps(plain))
    return path


def test_a_compressed_student_in_two_halves_goes_on_where_a_whole_one_stopped(
    trained_llama: Path, text_file: Path, tmp_path: Path, ranks: Ranks
) -> None:
    student = compress(trained_llama, tmp_path / "student", _pick)
    extras = {"ema": 0.5, "activation_checkpointing": True, "shard": True, "accumulate": 2, "evaluate_every": 2}
    extras["batch_tokens"] = 3 * 32  # two samples for one process, in two parts, and one for the other
    recipe = _recipe(tmp_path / "recipe.yaml", text_file, extras)
    run(make_plan(student, trained_llama, Destination(tmp_path / "alone"), load(str(recipe))))
    plan = make_plan(student, trained_llama, Destination(tmp_path / "together"), load(str(recipe)))
    with pytest.raises(KeyboardInterrupt):
        run(plan, Options(progress=_stop), TrainingOptions(save_seconds=0))
    ranks.together(student, tmp_path / "together", recipe, "--teacher", str(trained_llama), "--resume", verb="distill")
    alone, together = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "together"))
    before = load_file(student / "model.safetensors")
    assert any(not torch.equal(before[name], tensor) for name, tensor in alone.items())
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-4, atol=1e-4)
    reports = [json.loads((tmp_path / o / "report.json").read_text())["training"] for o in ("alone", "together")]
    assert reports[0]["trained_parameters"] == reports[1]["trained_parameters"]
    assert "parameters_per_process" not in reports[0]
    assert 0.5 <= reports[1]["parameters_per_process"] / reports[1]["trained_parameters"] < 0.51
    assert reports[1]["held_out_after"] == pytest.approx(reports[0]["held_out_after"], rel=1e-4)


def test_zeros_and_movement_of_a_divided_student_are_those_of_a_whole_one(
    trained_llama: Path, text_file: Path, tmp_path: Path, ranks: Ranks
) -> None:

    sparse = tmp_path / "sparse"
    sparse.mkdir()
    for file in trained_llama.iterdir():
        (sparse / file.name).write_bytes(file.read_bytes())
    tensors = load_file(sparse / "model.safetensors")
    for name, tensor in tensors.items():
        if "mlp" in name:
            tensor[::2, ::3] = 0
    save_file(tensors, sparse / "model.safetensors", {"format": "pt"})
    recipe = _recipe(tmp_path / "recipe.yaml", text_file, {"shard": True, "keep_zeros": True})
    moved = [tmp_path / f"{name}.safetensors" for name in ("alone", "together")]
    plan = make_plan(sparse, trained_llama, Destination(tmp_path / "alone"), load(str(recipe)))
    run(plan, Options(), TrainingOptions(movement_file=moved[0]))
    given = ("--teacher", str(trained_llama), "--stats", str(moved[1]))
    ranks.together(sparse, tmp_path / "together", recipe, *given, verb="distill")
    one, two = (load_file(path) for path in moved)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)
    reports = [json.loads((tmp_path / o / "report.json").read_text())["training"] for o in ("alone", "together")]
    assert reports[0]["zeros_kept"] == reports[1]["zeros_kept"] > 0
    written = Checkpoint.open(tmp_path / "together")
    for name in (name for name in tensors if "mlp" in name):
        assert not written.dense(name)[::2, ::3].any()


def test_a_mean_teacher_is_divided_as_its_student_is(
    trained_llama: Path, text_file: Path, tmp_path: Path, ranks: Ranks
) -> None:
    sections = {"method": {"name": "consistency"}, "mean_teacher": {"dropout": 1e-9}}
    recipe = _recipe(tmp_path / "recipe.yaml", text_file, {"shard": True, "steps": 2}, **sections)
    run(make_plan(trained_llama, None, Destination(tmp_path / "alone"), load(str(recipe))))
    ranks.together(trained_llama, tmp_path / "together", recipe, verb="distill")
    alone, together = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "together"))
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-4, atol=1e-4)


def test_a_mode_that_takes_no_steps_with_all_of_the_student_says_so(
    trained_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = _recipe(tmp_path / "recipe.yaml", text_file, {"shard": True}, mode={"name": "norms"})
    with pytest.raises(RecipeError, match=r"mode norms .* nothing to shard"):
        make_plan(trained_llama, trained_llama, Destination(tmp_path / "out"), load(str(recipe)))


def _stop(what: str, done: int, total: int) -> None:
    raise KeyboardInterrupt
