"""Fisher and SNIP: second and first order of the loss, by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from aicompress.layer import GradientStats, InputStats
from aicompress.methods import get
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.prune.fisher import FisherConfig
from aicompress.methods.prune.snip import SnipConfig
from tests.methods.layers import layer_of, randn


def pruned(name: str, layer: object, config: object) -> Tensor:
    method = get("prune", name)
    assert isinstance(method, LayerMethod)
    return method.apply(layer, config).dense()  # type: ignore[arg-type]


def test_by_hand() -> None:
    """w² E[g²] / 2 = (2, 4.5, 0.5, 8); |E[g] w| = (0.2, 0.3, 1, 0.4)."""
    moments = GradientStats(4, torch.tensor([[0.1, 0.1, 1.0, 0.1]]), torch.ones(1, 4))
    layer = layer_of(torch.tensor([[2.0, 3.0, 1.0, 4.0]]), gradients=moments)
    fisher = FisherConfig(name="fisher", sparsity=0.25)
    assert pruned("fisher", layer, fisher).tolist() == [[2.0, 3.0, 0.0, 4.0]]
    snip = SnipConfig(name="snip", sparsity=0.25, allocation="uniform", refit=False)
    assert pruned("snip", layer, snip).tolist() == [[0.0, 3.0, 1.0, 4.0]]


def test_it_is_exact_for_a_quadratic_loss_with_a_diagonal_hessian() -> None:
    weight, curvature = randn(8, 16), randn(8, 16, seed=1).abs() ** 3
    layer = layer_of(weight, gradients=GradientStats(4, torch.zeros(8, 16), curvature))
    change = 0.5 * curvature * (weight - pruned("fisher", layer, FisherConfig(name="fisher", sparsity=0.5))).square()
    least = (0.5 * curvature * weight.square()).flatten().sort().values[:64].sum()
    torch.testing.assert_close(change.sum(), least)


def test_with_a_refit_the_survivors_move_and_the_mask_stays() -> None:
    mixing = randn(16, 16, seed=2)
    gram = mixing @ mixing.t() / 16
    moments = GradientStats(4, randn(8, 16, seed=3), randn(8, 16, seed=4).square())
    layer = layer_of(randn(8, 16), inputs=InputStats(99, gram, gram.diagonal()), gradients=moments)
    plain = pruned("fisher", layer, FisherConfig(name="fisher", sparsity=0.5))
    moved = pruned("fisher", layer, FisherConfig(name="fisher", sparsity=0.5, refit=True))
    assert torch.equal(plain == 0, moved == 0)
    errors = [(((layer.weight - w) @ gram) * (layer.weight - w)).sum() for w in (plain, moved)]
    assert errors[1] < 0.9 * errors[0]
