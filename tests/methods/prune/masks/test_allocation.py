"""Sharing a sparsity among layers: exact totals, more for what needs more."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from aicompress.layer import Layer
from aicompress.methods.prune.masks.allocation import (
    SparsityShare,
    by_losses,
    by_outliers,
    exact,
    loss,
    measured,
    options,
    outliers,
)
from aicompress.statistics import GradientStats, InputStats
from tests.methods.layers import layer_of, randn


@pytest.mark.parametrize("kept", [5, 333, 1200, 2099])
def test_totals_are_exact(kept: int) -> None:
    shares = [SparsityShare(1000), SparsityShare(700), SparsityShare(400)]
    counts = exact(shares, [0.9, 0.01, 0.5], kept)
    assert sum(counts) == kept
    assert all(1 <= count <= share.size for count, share in zip(counts, shares, strict=True))


def test_totals_of_rows_and_blocks_are_as_near_as_units_allow() -> None:
    shares = [SparsityShare(64 * 10, unit=10), SparsityShare(32 * 16, unit=16)]
    counts = exact(shares, [0.5, 0.5], 577)
    assert counts[0] % 10 == 0
    assert counts[1] % 16 == 0
    assert 577 - 10 < sum(counts) <= 577


def test_owl_by_hand() -> None:
    """Outlier shares 0, 0.01 and 0.02 and λ = 0.1: densities 0.1 apart, around the average."""
    shares = [SparsityShare(1000, group=group) for group in range(3)]
    assert by_outliers(shares, [0.0, 0.01, 0.02], 900, 0.1) == [200, 300, 400]


def test_owl_gives_one_density_to_a_block_and_all_alike_the_same() -> None:
    shares = [SparsityShare(1000, group=0), SparsityShare(500, group=0), SparsityShare(1000, group=1)]
    counts = by_outliers(shares, [0.0, 0.03, 0.04], 1000, 0.08)
    assert counts[0] == pytest.approx(2 * counts[1], abs=2)
    assert counts[2] > counts[0]
    assert sum(counts) == 1000
    assert by_outliers(shares[:2], [0.01, 0.01], 600, 0.08) == [400, 200]


def test_outliers_by_hand() -> None:
    """|w| √E[x²] = (1, 1, 1, 21): the mean is 6, and one of four exceeds three times that."""
    norms = torch.tensor([1.0, 1.0, 1.0, 9.0])
    layer = layer_of(torch.tensor([[1.0, -1.0, 1.0, 7.0]]), inputs=InputStats.of(9, norms.diag(), {}))
    assert outliers(layer, 3.0) == 0.25
    assert outliers(layer, 5.0) == 0.0


def with_moments(weight: Tensor, scale: float) -> Layer:
    gram = torch.eye(weight.shape[1])
    moments = torch.full(weight.shape, scale)
    return layer_of(weight, inputs=InputStats.of(9, gram, {}), gradients=GradientStats(9, moments, moments))


def test_loss_by_hand() -> None:
    """c_i = Σ_j E[g²] / Σ_j H_jj = 3 for every output; the error is (1, 2): 1/2 * 3 * 5."""
    layer = with_moments(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 3.0)
    assert loss(layer, torch.tensor([[0.0, 0.0], [3.0, 4.0]])) == pytest.approx(7.5)


def kept_largest(layer: Layer) -> Any:
    def prune(count: int) -> Tensor:
        flat = layer.weight.flatten()
        kept = torch.zeros_like(flat)
        best = flat.abs().topk(count).indices
        kept[best] = flat[best]
        return kept.view_as(layer.weight)

    return prune


def test_least_loss_spends_where_the_loss_is_felt() -> None:
    layers = [with_moments(randn(20, 30, seed=seed), scale) for seed, scale in enumerate((1.0, 1.0, 30.0))]
    shares = [SparsityShare(600) for _ in layers]
    counts = [options(share, 0.4) for share in shares]
    losses = [measured(layer, row, kept_largest(layer)) for layer, row in zip(layers, counts, strict=True)]
    assert all(one > other for row in losses for one, other in pairwise(row))
    kept = by_losses(shares, counts, losses, 720)
    assert sum(kept) == 720
    assert kept[2] > 1.3 * kept[0]
    assert kept[0] == pytest.approx(kept[1], abs=40)

    def total(each: list[int]) -> float:
        return sum(loss(layer, kept_largest(layer)(count)) for layer, count in zip(layers, each, strict=True))

    assert total(kept) < 0.8 * total([240, 240, 240])


def test_least_loss_of_nothing_to_choose() -> None:
    shares = [SparsityShare(4), SparsityShare(4)]
    counts = [options(share, 1.0) for share in shares]
    assert sum(by_losses(shares, counts, [[0.1] * (len(row) - 1) + [0.0] for row in counts], 8)) == 8
