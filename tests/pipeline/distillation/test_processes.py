"""Training by several processes: the gradients of one batch, averaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aicompress.pipeline.distillation.plan import make_plan
from aicompress.pipeline.distillation.run import TrainingOptions, run
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe.distillation import load
from tests.pipeline.ranks import Ranks


def test_two_processes_go_on_where_one_was_stopped_and_learn_what_one_learns(
    tiny_llama: Path, trained_llama: Path, text_file: Path, tmp_path: Path, ranks: Ranks
) -> None:
    settings = {"steps": 3, "batch": 8, "evaluate_every": 3, "learning_rate": 1e-3, "precision": "fp32"}
    recipe = tmp_path / "recipe.yaml"
    data = {"text": str(text_file), "length": 32}
    recipe.write_text(json.dumps({"version": 1, "method": {"name": "kl"}, "data": data, "training": settings}))
    run(make_plan(tiny_llama, trained_llama, Destination(tmp_path / "alone"), load(str(recipe))))
    plan = make_plan(tiny_llama, trained_llama, Destination(tmp_path / "together"), load(str(recipe)))
    with pytest.raises(KeyboardInterrupt):
        run(plan, Options(progress=_stop), TrainingOptions(save_seconds=0))
    given = ("--teacher", str(trained_llama), "--resume")
    ranks.together(tiny_llama, tmp_path / "together", recipe, *given, verb="distill")
    alone, together = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "together"))
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-3, atol=2e-4)
    training = json.loads((tmp_path / "together" / "report.json").read_text())["training"]
    assert training["processes"] == 2
    assert [point["step"] for point in training["curve"]] == [0, 3]


def _stop(what: str, done: int, total: int) -> None:
    raise KeyboardInterrupt
