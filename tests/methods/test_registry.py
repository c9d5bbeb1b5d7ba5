"""Methods are found by discovery: a file with a METHOD is all that a new one takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from aicompress.checkpoint import Checkpoint
from aicompress.errors import RecipeError
from aicompress.methods import COMMANDS, get, methods, quantize
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.method import OF_GRADIENTS, OF_TRAINING
from aicompress.statistics import column_statistics
from tests.methods.contract import layer_of, resolved, variants
from tests.pipeline.calibration.steps import run, text, write_recipe

GRAM_METHOD = '''
"""Round to nearest with one scale for a layer, chosen for the least tr((W - Q) H (W - Q)^T)."""

from typing import Literal

import torch
from pydantic import Field

from aicompress.layer import Layer, LayerInfo
from aicompress.methods import MethodConfig
from aicompress.methods.curvature import gram, loss
from aicompress.methods.layerwise import LayerMethod
from aicompress.weights import IntGrouped, Weight


class GridConfig(MethodConfig):
    """Parameters of grid."""

    name: Literal["grid"] = "grid"
    steps: int = Field(10, ge=1, le=100, description="scales that are tried")


def outline(info: LayerInfo, config: GridConfig) -> Weight:
    return IntGrouped.outline(info.shape, (torch.float16, (1, 1)), True, 8, 0)


def apply(layer: Layer, config: GridConfig) -> Weight:
    hessian, full = gram(layer), layer.weight.abs().amax().clamp_min(1e-5) / 127

    def rounded(step: int) -> IntGrouped:
        scale = (full * (1 - step / (2 * config.steps))).reshape(1, 1).half()
        codes = (layer.weight / scale.float()).round().clamp(-128, 127).to(torch.int8)
        return IntGrouped(codes, scale, None, 8, 0)

    return min((rounded(step) for step in range(config.steps)), key=lambda w: loss(layer.weight - w.dense(), hessian))


METHOD = LayerMethod(
    name="grid",
    command="quantize",
    summary="one scale for a layer, of least output error; calibrated",
    when="never: it shows how a method is added",
    config=GridConfig,
    needs=frozenset({"gram"}),
    apply=apply,
    outline=outline,
)
'''


@pytest.fixture
def new_method(joins: Callable[[ModuleType, str, str], None]) -> str:
    """A method of quantize in a file of its own, outside of the package."""
    joins(quantize, "grid_search", GRAM_METHOD)
    return "grid"


def test_one_file_adds_a_method_that_reads_gram_matrices(
    new_method: str, tmp_path: Path, tiny_llama: Path, text_file: Path
) -> None:
    recipe = write_recipe(tmp_path, text(text_file, samples=2), method={"name": new_method, "steps": 4})
    report = run(tiny_llama, tmp_path / "out", recipe)
    compressed = [row for row in report.layers if row.method == new_method]
    assert len(compressed) == 21  # 7 linear layers in each of 3 blocks
    assert {row.form for row in compressed} == {"int_grouped"}
    before, after = Checkpoint.open(tiny_llama), Checkpoint.open(tmp_path / "out")
    for row in compressed:
        name = f"{row.name}.weight"
        change = torch.linalg.norm(before.dense(name) - after.dense(name)) / torch.linalg.norm(before.dense(name))
        assert 0 < row.rel_error < 0.05
        assert float(change) == pytest.approx(row.rel_error, rel=1e-3)


def test_a_new_method_meets_the_contract(new_method: str) -> None:
    method = get("quantize", new_method)
    for fields in variants(method):
        layer = layer_of(method, (16, 24))
        config = resolved(method, layer, fields)
        assert config is not None
        weight = method.apply(layer, config)
        assert weight.specs() == method.outline(layer.info, config).specs()


def test_a_file_that_is_gone_is_no_method() -> None:
    with pytest.raises(RecipeError, match="quantize has no method 'grid'"):
        get("quantize", "grid")


@pytest.mark.usefixtures("new_method")
def test_two_methods_of_one_name(joins: Callable[[ModuleType, str, str], None]) -> None:
    joins(quantize, "grid_again", GRAM_METHOD)
    with pytest.raises(TypeError, match=r"two files of .* are named 'grid'"):
        methods("quantize")


def test_a_method_lacks_what_it_does_not_name() -> None:
    bare = dataclasses.replace(get("quantize", "rtn"), allocates=None, widths=None, row_wise=None)
    config = bare.config(name="rtn", bits=4)
    assert bare.reads(config) == bare.surveyed(config) == frozenset()
    assert not bare.compares(config)
    assert not bare.rewrites


def test_every_method_says_when_to_take_it() -> None:
    for command in COMMANDS:
        for method in methods(command).values():
            assert 20 <= len(method.when) <= 110, method.name
            assert "\n" not in method.when
            assert not method.when.endswith(".")
            assert method.when != method.summary


def test_every_statistic_that_a_layer_wise_method_reads_is_one() -> None:
    known = {"gram", "frequency", *column_statistics(), *OF_GRADIENTS, *OF_TRAINING}
    read = {name: method.needs - known for command in COMMANDS for name, method in layer_wise(command).items()}
    assert {name: unknown for name, unknown in read.items() if unknown} == {}


def layer_wise(command: str) -> dict[str, LayerMethod]:
    return {name: each for name, each in methods(command).items() if isinstance(each, LayerMethod)}
