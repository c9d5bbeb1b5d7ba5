"""Taylor pruning: what the loss feels least goes, whatever its size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aicompress.errors import CompressError
from aicompress.methods import get
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.prune.taylor import TaylorConfig
from aicompress.statistics import GradientStats
from tests.methods.layers import layer_of, randn


def gradients_of(samples: Tensor) -> GradientStats:
    """Moments of gradients (samples, out, in)."""
    return GradientStats(len(samples), samples.mean(0), samples.square().mean(0))


def pruned(layer: Any, **fields: Any) -> Tensor:
    method = get("prune", "taylor")
    assert isinstance(method, LayerMethod)
    config = TaylorConfig(name="taylor", **{"refit": False, **fields})
    return method.apply(layer, config).dense()


def test_by_hand() -> None:
    """w E[g] = (3, 4, 0, 1.5), and w² E[g²] = (9, 16, 4, 2.25): the third sample's signs cancel in the mean alone."""
    weight = torch.tensor([[3.0, 4.0, 2.0, 1.0]])
    samples = torch.tensor([[[1.0, 1.0, 1.0, 1.5]], [[1.0, 1.0, -1.0, 1.5]]])
    layer = layer_of(weight, gradients=gradients_of(samples))
    mean = pruned(layer, sparsity=0.25, moment="mean")
    square = pruned(layer, sparsity=0.25, moment="square")
    assert mean.tolist() == [[3.0, 4.0, 0.0, 1.0]]
    assert square.tolist() == [[3.0, 4.0, 2.0, 0.0]]


@pytest.mark.parametrize("moment", ["mean", "square"])
def test_it_changes_a_linear_loss_less_than_magnitude(moment: str) -> None:
    """Of a loss that is linear in the weights, Taylor's first order is exact."""
    weight, slopes = randn(8, 16), randn(8, 16, seed=1).abs() ** 3
    layer = layer_of(weight, gradients=gradients_of(slopes.expand(4, 8, 16)))
    by_size = weight * (weight.abs() >= weight.abs().flatten().kthvalue(65).values)
    change = ((weight - pruned(layer, sparsity=0.5, moment=moment)) * slopes).abs().sum()
    assert change < 0.7 * ((weight - by_size) * slopes).abs().sum()


def test_as_optimal_brain_damage_it_is_exact_for_a_quadratic_loss_with_a_diagonal_hessian() -> None:
    weight, curvature = randn(8, 16), randn(8, 16, seed=1).abs() ** 3
    layer = layer_of(weight, gradients=GradientStats(4, torch.zeros(8, 16), curvature))
    change = 0.5 * curvature * (weight - pruned(layer, sparsity=0.5, loss="own")).square()
    least = (0.5 * curvature * weight.square()).flatten().sort().values[:64].sum()
    torch.testing.assert_close(change.sum(), least)


def test_tiny_gradients_do_not_vanish() -> None:
    weight, samples = randn(8, 16), randn(4, 8, 16, seed=1)
    large = layer_of(weight, gradients=gradients_of(samples))
    moments = gradients_of(samples.double() * 1e-16)
    small = layer_of(weight, gradients=GradientStats(4, moments.mean, moments.square))
    assert torch.equal(pruned(small, sparsity=0.5), pruned(large, sparsity=0.5))


def test_a_layer_without_gradients_is_named() -> None:
    with pytest.raises(CompressError, match=r"layers\.0\.fc: there are no gradients"):
        pruned(layer_of(randn(4, 4)), sparsity=0.5)
