"""A statistic of inputs is one file: what is written here as one is collected, stored, merged and read by a method."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.statistics import StatisticsFile
from aicompress.pipeline.calibration.request import Request
from aicompress.pipeline.layerwise import planner
from aicompress.pipeline.layerwise.run import run as run_plan
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe import load
from aicompress.statistics import InputStats
from tests.methods.layers import columns_of, randn
from tests.pipeline.calibration.steps import text, write_recipe

STATISTIC = '''
"""The mean of x⁴."""

from aicompress.statistics.column import ColumnStatistic

STATISTIC = ColumnStatistic("fourth", lambda x: x.square().square(), degree=4)
'''
METHOD = '''
"""The weights of least |w| E[x⁴]^(1/4) in each row become zero."""

from typing import Literal

from aicompress.methods.curvature import statistics
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.method import MethodConfig
from aicompress.weights import Dense


class Config(MethodConfig):
    """Parameters of tails."""

    name: Literal["tails"] = "tails"


def apply(layer, config):
    scores = layer.weight.abs() * statistics(layer).columns["fourth"].pow(0.25)
    return Dense((layer.weight * (scores > scores.median(1, keepdim=True).values)).to(layer.info.dtype))


METHOD = LayerMethod(
    name="tails", command="prune", summary="half of each row, by fourth moments", when="never: it shows a statistic",
    config=Config, needs=frozenset({"fourth"}), apply=apply,
    outline=lambda info, config: Dense.outline(info.shape, info.dtype),
)
'''
FILES = {"aicompress.statistics.columns": ("fourth", STATISTIC), "aicompress.methods.prune": ("tails", METHOD)}


@pytest.fixture
def added(joins: Callable[[ModuleType, str, str], None]) -> None:
    """The statistic `fourth` and the method `tails`."""
    for package, (name, content) in FILES.items():
        joins(importlib.import_module(package), name, content)


@pytest.mark.usefixtures("added")
def test_a_method_reads_it(tmp_path: Path, tiny_llama: Path, text_file: Path) -> None:
    recipe = write_recipe(tmp_path, text(text_file, samples=2), method={"name": "tails"})
    loaded = load(str(recipe), "prune")
    request = Request(stats=(tmp_path / "seen.safetensors",))
    plan = planner.make_plan(tiny_llama, Destination(tmp_path / "out"), loaded, "prune", request)
    run_plan(plan, Options(latency="off"))
    seen = StatisticsFile.open(tmp_path / "seen.safetensors").stats("model.layers.0.mlp.down_proj.weight")
    before, after = (
        Checkpoint.open(path).dense("model.layers.0.mlp.down_proj.weight") for path in (tiny_llama, tmp_path / "out")
    )
    scores = before.abs() * seen.columns["fourth"].pow(0.25)
    assert torch.equal(after != 0, scores > scores.median(1, keepdim=True).values)


@pytest.mark.usefixtures("added")
def test_it_goes_where_the_others_go() -> None:
    rows, more = randn(30, 4), randn(10, 4, seed=1)
    own, other = (InputStats(len(each), columns=columns_of(each)) for each in (rows, more))
    both = own.merged(other).columns["fourth"]
    torch.testing.assert_close(both, torch.cat([rows, more]).pow(4).mean(0))
    factors, order = torch.tensor([1.0, 2.0, 0.5, 3.0]), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(own.divided(factors).columns["fourth"], (rows / factors).pow(4).mean(0))
    torch.testing.assert_close(own.in_order(order).columns, columns_of(rows[:, order]))
    assert torch.equal(InputStats.white(4).columns["fourth"], torch.ones(4))
    assert "fourth" not in replace(own, gram=torch.eye(4)).through(randn(2, 4)).columns
