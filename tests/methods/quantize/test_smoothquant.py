"""smoothquant: the factors of equation 4, and a smaller error where inputs are quantized per token."""

from __future__ import annotations

import torch
from torch import Tensor

from aicompress.layer import Layer
from aicompress.methods.quantize import smoothquant
from aicompress.methods.quantize.smoothquant import SmoothquantConfig
from aicompress.statistics import InputStats
from tests.methods.layers import candidate_of
from tests.methods.quantize.layers import gaussian, layer_of


def same(factors: torch.Tensor) -> torch.Tensor:
    return factors


def per_token(rows: Tensor) -> Tensor:
    """Inputs rounded to 8 bits with a scale per row, as W8A8 layers do."""
    scale = rows.abs().amax(1, keepdim=True) / 127
    return (rows / scale).round() * scale


def watched(weight: Tensor, rows: Tensor) -> Layer:
    layer = layer_of(weight)
    return Layer(layer.info, weight, None, InputStats(len(rows), columns={"max_abs": rows.abs().amax(0)}))


def test_factors_by_hand() -> None:
    """√(16/4) = 2, √(9/1) = 3; a channel without inputs or without weights keeps its factor 1."""
    inputs, weights = torch.tensor([16.0, 9.0, 0.0, 5.0]), torch.tensor([4.0, 1.0, 2.0, 0.0])
    assert smoothquant.smoothing(inputs, weights, 0.5).tolist() == [2.0, 3.0, 1.0, 1.0]
    torch.testing.assert_close(smoothquant.smoothing(inputs, weights, 1.0)[:2], inputs[:2])
    torch.testing.assert_close(smoothquant.smoothing(inputs, weights, 0.0)[:2], 1 / weights[:2])


def test_outliers_of_inputs_cost_less() -> None:
    rows = gaussian(200, 64)
    rows[:, 5] *= 80
    layer = watched(gaussian(32, 64, seed=1), rows)
    found = smoothquant.scaling_factors([candidate_of(layer, SmoothquantConfig())], same)
    assert found is not None
    exact, errors = rows @ layer.weight.t(), []
    for factors in (found.factors, torch.ones(64)):
        moved = Layer(layer.info, layer.weight * factors, None, layer.inputs)
        given = per_token(rows / factors) @ smoothquant.apply(moved, SmoothquantConfig()).dense().t()
        errors.append(float((given - exact).square().sum()))
    assert errors[0] < 0.1 * errors[1]


def test_all_layers_of_an_input_count() -> None:
    rows = gaussian(50, 8)
    narrow, wide = watched(gaussian(4, 8), rows), watched(10 * gaussian(4, 8, seed=2), rows)
    config = SmoothquantConfig()
    both = smoothquant.scaling_factors([candidate_of(layer, config) for layer in (narrow, wide)], same)
    alone = smoothquant.scaling_factors([candidate_of(wide, config)], same)
    assert both is not None
    assert alone is not None
    assert torch.equal(both.factors, alone.factors)
