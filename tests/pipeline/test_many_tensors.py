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
