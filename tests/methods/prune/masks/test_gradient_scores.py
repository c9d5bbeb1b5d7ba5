"""Edges of pruning by gradients: nothing, everything, ties, codes, and what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aicompress.layer import Layer
from aicompress.methods import get
from aicompress.methods.layerwise import LayerMethod
from aicompress.statistics import GradientStats, InputStats
from aicompress.weights import IntGrouped, Sparse, Weight
from tests.methods.layers import layer_of, randn

MOMENTS = ["square", "mean"]


def graded(weight: torch.Tensor | Weight, flat: bool = False) -> Layer:
    shape = weight.shape
    inputs = randn(200, shape[1], seed=1)
    gram = inputs.t() @ inputs / 200
    samples = torch.ones(5, *shape) if flat else randn(5, *shape, seed=2)
    moments = GradientStats(5, samples.mean(0), samples.square().mean(0))
    return layer_of(weight, inputs=InputStats.of(200, gram, {}), gradients=moments)


def taylor() -> LayerMethod:
    method = get("prune", "taylor")
    assert isinstance(method, LayerMethod)
    return method


def config_of(**fields: Any) -> Any:
    return taylor().config.model_validate({"name": "taylor", "allocation": "uniform", **fields})


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("moment", MOMENTS)
def test_nothing_to_prune_changes_nothing(moment: str, refit: bool) -> None:
    layer = graded(randn(8, 16))
    found = taylor().apply(layer, config_of(moment=moment, sparsity=0.0, refit=refit))
    torch.testing.assert_close(found.dense(), layer.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_sparsity_that_rounds_to_nothing_is_noted(moment: str) -> None:
    config = config_of(moment=moment, sparsity=0.003, refit=False)
    found = taylor().apply(graded(randn(8, 16)), config)
    assert (found.dense() != 0).all()
    assert "rounds to none" in taylor().describe(config, found)["note"]


@pytest.mark.parametrize("fields", [{"sparsity": 1.0}, {"sparsity": 0.999}, {"sparsity": 0.9, "block": "8x8"}])
@pytest.mark.parametrize("moment", MOMENTS)
def test_pruning_everything_is_refused(moment: str, fields: dict[str, Any]) -> None:
    refusal = taylor().check(graded(randn(8, 16)).info, config_of(moment=moment, **fields))
    assert refusal is not None
    assert "would prune all" in refusal[0]


@pytest.mark.parametrize("moment", MOMENTS)
def test_ties_keep_the_first(moment: str) -> None:
    layer = graded(torch.ones(4, 8), flat=True)
    found = taylor().apply(layer, config_of(moment=moment, sparsity=0.5, refit=False)).dense()
    assert found.flatten().tolist() == [1.0] * 16 + [0.0] * 16


@pytest.mark.parametrize(("shape", "pattern"), [((4, 3), "2:4"), ((4, 6), "4:8"), ((1, 1), "1:2")])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_layer_too_small_for_the_pattern_is_refused(moment: str, shape: tuple[int, int], pattern: str) -> None:
    refusal = taylor().check(graded(randn(*shape)).info, config_of(moment=moment, pattern=pattern))
    assert refusal is not None
    assert "does not divide" in refusal[0]


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("moment", MOMENTS)
def test_codes_stay_codes(moment: str, refit: bool) -> None:
    codes = IntGrouped((randn(8, 32) * 3).clamp(-8, 7).to(torch.int8), torch.rand(8, 2) + 0.1, None, 4, 16)
    found = taylor().apply(graded(codes), config_of(moment=moment, sparsity=0.75, refit=refit))
    assert isinstance(found, IntGrouped)
    assert torch.equal(found.scale, codes.scale)
    assert int((found.codes == 0).sum()) >= 192


@pytest.mark.parametrize("moment", MOMENTS)
def test_zeros_of_an_earlier_step_stay(moment: str) -> None:
    sparse = Sparse.of(randn(8, 16), randn(8, 16, seed=5) > 0)
    config = config_of(moment=moment, sparsity=0.7, store="sparse")
    found = taylor().apply(graded(sparse), config)
    assert isinstance(found, Sparse)
    assert not (found.mask & ~sparse.mask).any()


@pytest.mark.parametrize("moment", MOMENTS)
def test_what_is_not_read_is_not_asked_for(moment: str) -> None:
    method = taylor()
    assert method.reads(config_of(moment=moment, sparsity=0.5, refit=False)) == {"gradients"}
    assert method.reads(config_of(moment=moment, sparsity=0.5, refit=True)) == {"gradients", "gram"}
