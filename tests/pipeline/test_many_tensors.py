"""The work for a tensor does not depend on how many others there are."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from aicompress import recipe as recipes
from aicompress.pipeline import steps
from aicompress.pipeline.inspect import inspect
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.verify import verify
from tests import checkpoints


def quantize(source: Path) -> object:
    recipe = recipes.load("quantize/rtn-w8", "quantize", ["report.html=false"])
    out = Destination(source.with_name(f"{source.stem}.out.safetensors"))
    return steps.run(steps.make_plan(source, out, recipe, "quantize"), Options(latency="off"))


@pytest.mark.parametrize("work", [quantize, verify, inspect])
def test_calls_grow_with_the_number_of_tensors(work: Callable[[Path], object], tmp_path: Path) -> None:
    def calls(count: int) -> int:
        path = tmp_path / f"{count}.safetensors"
        save_file({f"l.{number}.weight": torch.ones(4, 8) for number in range(count)}, path)
        profile = cProfile.Profile()
        profile.runcall(work, path)
        return pstats.Stats(profile).total_calls

    calls(1)  # what is imported and built once
    few, more, most = (calls(count) for count in (64, 128, 192))
    assert abs((most - more) - (more - few)) < 0.05 * (more - few)


def test_calls_that_write_a_structural_output_grow_with_the_number_of_tensors(tmp_path: Path) -> None:
    """Three matrices for each expert of two blocks."""

    def calls(experts: int) -> int:
        source = checkpoints.make_qwen_moe(tmp_path / f"{experts}", experts)
        recipe = recipes.load("prune/depth-half", "prune", ["report.html=false"])
        plan = steps.make_plan(source, Destination(tmp_path / f"{experts}-out"), recipe, "prune")
        profile = cProfile.Profile()
        profile.runcall(steps.run, plan, Options(latency="off"))
        return pstats.Stats(profile).total_calls

    calls(2)
    few, more, most = (calls(experts) for experts in (16, 32, 48))
    assert abs((most - more) - (more - few)) < 0.05 * (more - few)
