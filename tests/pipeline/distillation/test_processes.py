"""Training by several processes: the gradients of one batch, averaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aicompress.layer import LayerInfo
from aicompress.pipeline.distillation.plan import make_plan
from aicompress.pipeline.distillation.run import TrainingOptions, run
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe.distillation import load
from aicompress.weights import Weight
from tests.model.compressed import compress, integers, low_rank
from tests.pipeline.ranks import Ranks


def test_two_processes_go_on_where_one_was_stopped_and_learn_what_one_learns(
    tiny_llama: Path, trained_llama: Path, text_file: Path, tmp_path: Path, ranks: Ranks
) -> None:
    settings = {"steps": 3, "batch": 8, "evaluate_every": 3, "learning_rate": 1e-3, "precision": "fp32"}
    settings["batch_tokens"] = 7 * 32  # four samples for one process, three for the other
    recipe = tmp_path / "recipe.yaml"
    data = {"text": str(text_file), "length": 32}
    recipe.write_text(json.dumps({"version": 1, "method": {"name": "kl"}, "data": data, "training": settings}))
    run(make_plan(tiny_llama, trained_llama, Destination(tmp_path / "alone"), load(str(recipe))))
    plan = make_plan(tiny_llama, trained_llama, Destination(tmp_path / "together"), load(str(recipe)))
    with pytest.raises(KeyboardInterrupt):
        run(plan, Options(progress=_stop), TrainingOptions(save_seconds=0))
    given = ("--teacher", str(trained_llama), "--resume", "--log-dir", str(tmp_path / "logs"))
    ranks.together(tiny_llama, tmp_path / "together", recipe, *given, verb="distill")
    alone, together = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "together"))
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-4, atol=1e-4)
    training = json.loads((tmp_path / "together" / "report.json").read_text())["training"]
    assert training["processes"] == 2
    assert [point["step"] for point in training["curve"]] == [0, 3]
    logged = [json.loads(line)["step"] for line in (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert logged == [2, 3, 3]  # by one of the two


def test_two_processes_tune_the_blocks_that_one_tunes(
    trained_llama: Path, text_file: Path, tmp_path: Path, ranks: Ranks
) -> None:
    def pick(info: LayerInfo, matrix: torch.Tensor) -> Weight | None:
        if info.kind != "linear":
            return None
        return low_rank(matrix, 8) if "mlp" in info.name else integers(matrix, 4, 16)

    student = compress(trained_llama, tmp_path / "student", pick)
    recipe = tmp_path / "recipe.yaml"
    mode = {"name": "blocks", "steps": 3, "samples": 10}  # a last batch of two
    data = {"text": str(text_file), "length": 32, "samples": 40}
    training = {"batch": 8, "precision": "fp32"}
    plain = {"version": 1, "mode": mode, "method": {"name": "kl"}, "data": data, "training": training}
    recipe.write_text(json.dumps(plain))
    run(make_plan(student, trained_llama, Destination(tmp_path / "alone"), load(str(recipe))))
    ranks.together(student, tmp_path / "together", recipe, "--teacher", str(trained_llama), verb="distill")
    alone, together = (
        json.loads((tmp_path / o / "report.json").read_text())["training"] for o in ("alone", "together")
    )
    assert together["processes"] == 2
    assert alone["held_out_after"] < alone["held_out_before"]
    for figure in ("held_out_before", "held_out_after"):
        assert together[figure] == pytest.approx(alone[figure], rel=1e-4)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("alone", "together")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-4)
    mode["samples"] = 9
    recipe.write_text(json.dumps(plain))
    with pytest.raises(
        AssertionError, match="9 samples to tune on leave 1 for the last batch, and 2 processes share it"
    ):
        ranks.together(student, tmp_path / "uneven", recipe, "--teacher", str(trained_llama), verb="distill")


def _stop(what: str, done: int, total: int) -> None:
    raise KeyboardInterrupt
