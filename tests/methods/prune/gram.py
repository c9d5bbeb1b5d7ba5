"""Layers with correlated inputs, and the loss that calibrated pruning is about."""

from __future__ import annotations

import torch
from torch import Tensor

from aicompress.layer import Layer
from aicompress.statistics import InputStats
from aicompress.weights import Weight
from tests.methods.layers import layer_of, randn


def correlated(columns: int, rows: int = 2000, seed: int = 0) -> Tensor:
    """Inputs (rows, columns) of very different sizes that share a few directions."""
    mixed = randn(rows, columns, seed=seed) @ (torch.eye(columns) + 0.5 * randn(columns, columns, seed=seed + 1))
    return mixed * torch.logspace(-1, 1, columns)


def stats(inputs: Tensor) -> InputStats:
    """Their statistics."""
    gram = inputs.t() @ inputs / len(inputs)
    return InputStats.of(len(inputs), gram, {"mean_abs": inputs.abs().mean(0)})


def calibrated(out: int = 24, columns: int = 64, stored: Weight | Tensor | None = None) -> Layer:
    """A layer with such inputs."""
    weight = randn(out, columns, seed=5) if stored is None else stored
    return layer_of(weight, inputs=stats(correlated(columns)))


def loss(layer: Layer, weight: Weight) -> float:
    """tr(E H Eᵀ) in float64."""
    assert layer.inputs is not None
    assert layer.inputs.gram is not None
    error = (layer.weight - weight.dense()).double()
    return float(((error @ layer.inputs.gram.double()) * error).sum())
