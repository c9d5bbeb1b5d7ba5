"""activation and fisher: the weights of rows and columns decide what stays, and each is its full form on a diagonal."""

from __future__ import annotations

import torch

from aicompress.methods.factorize import activation, fisher, whitened
from aicompress.methods.factorize.activation import ActivationConfig
from aicompress.methods.factorize.fisher import FisherConfig
from aicompress.methods.factorize.whitened import WhitenedConfig
from aicompress.statistics import GradientStats, InputStats
from tests.methods.layers import layer_of, randn


def test_activation_is_whitened_on_independent_inputs() -> None:
    squares = torch.logspace(0, -3, 40)
    layer = layer_of(randn(24, 40), inputs=InputStats.of(99, torch.diag(squares), {}, torch.diag(squares)))
    expected = whitened.METHOD.apply(layer, WhitenedConfig(rank=5, shift=0)).dense()
    assert torch.allclose(activation.METHOD.apply(layer, ActivationConfig(rank=5)).dense(), expected, atol=1e-4)


def test_fisher_keeps_what_the_loss_feels() -> None:
    """Two weights, one of them larger; the gradients of the other are."""
    weight, square = torch.zeros(5, 5), torch.full((5, 5), 0.01)
    weight[0, 0], weight[1, 1] = 2.0, 1.0
    square[1, 1] = 16.0
    layer = layer_of(weight, gradients=GradientStats(8, torch.zeros(5, 5), square))
    expected = torch.zeros(5, 5)
    expected[1, 1] = 1.0
    assert torch.allclose(fisher.METHOD.apply(layer, FisherConfig(rank=1)).dense(), expected, atol=1e-5)


def test_fisher_of_a_product_is_weighted_least_squares() -> None:
    """Where F = r cᵀ, no other factors of the rank have less Σ F (w − ŵ)²."""
    square = torch.logspace(0, -2, 24)[:, None] * torch.logspace(-2, 0, 40)
    layer = layer_of(randn(24, 40), gradients=GradientStats(8, torch.zeros(24, 40), square))

    def error(dense: torch.Tensor) -> float:
        return float((square * (layer.weight - dense).square()).sum())

    ours = fisher.METHOD.apply(layer, FisherConfig(rank=5, damping=0)).dense()
    u, s, v = torch.linalg.svd(layer.weight * square.sqrt(), full_matrices=False)
    best = float(s[5:].square().sum())
    assert abs(error(ours) - best) < 1e-4 * best
    u, s, v = torch.linalg.svd(layer.weight, full_matrices=False)
    assert error(ours) < 0.8 * error(u[:, :5] * s[:5] @ v[:5])
