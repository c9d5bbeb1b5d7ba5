"""Checks that a plan makes before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from aicompress.errors import CheckpointError, CompressError
from aicompress.methods import get
from aicompress.pipeline.step.checks import require_loads
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.steps import make_plan
from aicompress.recipe import Recipe
from tests.pipeline.families import FAMILIES
from tests.pipeline.steps import plan


def test_an_output_that_would_not_load_is_refused(tmp_path: Path) -> None:
    FAMILIES["llama"].saved(tmp_path / "in")
    planned = plan(tmp_path / "in", tmp_path / "out", name="width", sparsity=0.5)
    specs = {name: parameter.dense for name, parameter in planned.output.parameters.items()}
    config = planned.output.config
    require_loads(planned.checkpoint, config, specs, {})
    del specs["model.layers.2.mlp.down_proj.weight"]
    with pytest.raises(CheckpointError, match=r"would not load: missing model.layers.2.mlp.down_proj.weight"):
        require_loads(planned.checkpoint, config, specs, {})


@pytest.mark.parametrize(("command", "method"), [("quantize", "rtn"), ("prune", "depth"), ("prune", "channels")])
def test_a_gate_on_what_no_step_measures_is_refused_before_the_work(
    tiny_llama: Path, tmp_path: Path, command: str, method: str
) -> None:
    fields = {"depth": {"drop": [1]}, "channels": {"sparsity": 0.5}}.get(method, {"bits": 8, "granularity": "channel"})
    config = get(command, method).config(name=method, **fields)
    figures = ("quality.kl", "training.loss", "after.load_seconds", "vocabulary.tokens")
    recipe = Recipe(version=1, method=config, gates=tuple(f"{figure} < 1" for figure in figures))
    with pytest.raises(CompressError) as refusal:
        make_plan(tiny_llama, Destination(tmp_path / "out"), recipe, command)
    problems = getattr(refusal.value, "problems", [refusal.value])
    for figure in figures:
        assert any(f"{figure} will not be measured" in problem.message and problem.hint for problem in problems)
