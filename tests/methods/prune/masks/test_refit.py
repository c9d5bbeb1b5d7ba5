"""refit against an exact solve of every row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aicompress.methods.curvature import damped
from aicompress.methods.curvature import loss as loss_of
from aicompress.methods.prune.masks.refit import refit
from tests.methods.layers import randn
from tests.methods.prune.gram import correlated, stats


def hessian(columns: int) -> Tensor:
    gram = stats(correlated(columns)).gram
    assert gram is not None
    return damped(gram.double(), 0.01)


def exact(wanted: Tensor, gram: Tensor, mask: Tensor) -> Tensor:
    found = torch.zeros_like(wanted)
    for row, kept in enumerate(mask):
        if kept.any():
            found[row, kept] = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ wanted[row])
    return found


@pytest.mark.parametrize("density", [0.05, 0.5, 0.95])
def test_equals_the_exact_solve_of_each_row(density: float) -> None:
    wanted, gram = randn(20, 48), hessian(48)
    mask = torch.rand(20, 48, generator=torch.Generator().manual_seed(1)) < density
    mask[3] = False
    mask[4] = True
    found = refit(wanted, gram.float(), mask, wanted, iterations=200)
    expected = exact(wanted.double(), gram, mask)
    assert torch.equal(found[~mask], torch.zeros_like(found[~mask]))
    assert loss_of(wanted - found, gram) <= loss_of(wanted - expected, gram) * (1 + 1e-4) + 1e-6
    assert torch.equal(found[3], torch.zeros(48))
    torch.testing.assert_close(found[4], wanted[4], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("iterations", [1, 2, 5, 20])
def test_no_iteration_raises_the_loss(iterations: int) -> None:
    wanted, gram = randn(20, 48), hessian(48)
    mask = randn(20, 48, seed=3) > 0
    before = loss_of(wanted - wanted * mask, gram)
    after = [loss_of(wanted - refit(wanted, gram.float(), mask, wanted, n), gram) for n in (iterations, 2 * iterations)]
    assert after[1] <= after[0] * (1 + 1e-6) < before


def test_hand_computed() -> None:
    """One survivor of two inputs with H = [[2, 1], [1, 2]]: w₀ + w₁ H₀₁ / H₀₀."""
    gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    found = refit(torch.tensor([[3.0, 4.0]]), gram, torch.tensor([[True, False]]), torch.tensor([[3.0, 4.0]]))
    torch.testing.assert_close(found, torch.tensor([[5.0, 0.0]]))


def test_a_kept_row_of_zeros_stays_zero() -> None:
    found = refit(torch.zeros(2, 6), hessian(6).float(), torch.ones(2, 6, dtype=torch.bool), torch.zeros(2, 6))
    assert torch.equal(found, torch.zeros(2, 6))
