"""Calibrated quantization where the inputs tell little: dead columns, too few rows, layers of one row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aicompress.layer import Layer
from aicompress.methods.layerwise import LayerMethod
from aicompress.statistics import GradientStats, InputStats
from tests.methods.contract import LAYERWISE, resolved, variants
from tests.methods.layers import layer_of, randn

CALIBRATED = [m for m in LAYERWISE if m.command == "quantize" and m.needs]
BY_NAME = pytest.mark.parametrize("method", CALIBRATED, ids=lambda method: method.name)


def inputs_of(rows: torch.Tensor) -> InputStats:
    """Statistics of inputs (rows, in)."""
    gram = rows.t() @ rows / len(rows)
    return InputStats.of(len(rows), gram, {"mean_abs": rows.abs().mean(0)}, gram)


def quantized(method: LayerMethod, layer: Layer) -> torch.Tensor:
    gradients = GradientStats.flat(layer.info.shape)
    layer = replace(layer, gradients=gradients) if "gradients" in method.needs else layer
    for fields in variants(method):
        config = resolved(method, layer, fields)
        if config is not None:
            return method.apply(layer, config).dense()
    raise AssertionError(f"{method.name}: none of its examples fits")


@BY_NAME
def test_dead_columns_stay_near_their_weights(method: LayerMethod) -> None:
    """Nothing is known of them, so that nothing may be made of them."""
    rows = randn(200, 64, seed=1)
    rows[:, ::4] = 0
    layer = layer_of(randn(16, 64), inputs=inputs_of(rows))
    found = quantized(method, layer)
    assert torch.isfinite(found).all()
    dead = (found - layer.weight)[:, ::4].norm() / layer.weight[:, ::4].norm()
    assert dead < 0.6


@BY_NAME
@pytest.mark.parametrize("count", [1, 20])
def test_a_singular_gram_matrix(method: LayerMethod, count: int) -> None:
    """Fewer rows than inputs: their outputs come near the layer's."""
    rows = randn(count, 64, seed=2)
    layer = layer_of(randn(16, 64), inputs=inputs_of(rows))
    found = quantized(method, layer)
    assert torch.isfinite(found).all()
    assert ((found - layer.weight) @ rows.t()).norm() < 0.6 * (layer.weight @ rows.t()).norm()


@BY_NAME
def test_a_layer_of_one_row(method: LayerMethod) -> None:
    layer = layer_of(randn(1, 64), inputs=inputs_of(randn(200, 64, seed=1)))
    found = quantized(method, layer)
    assert found.shape == (1, 64)
    assert torch.isfinite(found).all()


@BY_NAME
def test_inputs_that_are_all_zero(method: LayerMethod) -> None:
    layer = layer_of(randn(16, 64), inputs=inputs_of(torch.zeros(30, 64)))
    found = quantized(method, layer)
    assert (found - layer.weight).norm() < 0.6 * layer.weight.norm()
