"""base_delta: what it finds where blocks differ by little, by hand and on random layers; no round raises the error."""

from __future__ import annotations

import pytest
import torch

from aicompress.layer import Layer
from aicompress.methods.curvature import loss
from aicompress.methods.factorize import shared_basis
from aicompress.methods.factorize.base_delta import METHOD, BaseDeltaConfig
from aicompress.statistics import InputStats
from aicompress.weights import BaseDelta, Dense, Weight, outline_nbytes
from tests.methods.layers import layer_of, randn

SHARES = METHOD.shares
assert SHARES is not None


def blocks(noise: float = 0.0, rank: int = 3, count: int = 2) -> list[Layer]:
    """Layers (30, 40) of unlike inputs that differ by a low-rank matrix, and by noise."""
    common, found = randn(30, 40, seed=7), []
    for number in range(count):
        rows = randn(300, 40, seed=number) * torch.logspace(0, -1, 40).roll(5 * number)
        gram = rows.t() @ rows / len(rows)
        weight = common + randn(30, rank, seed=8 + number) @ randn(rank, 40, seed=20 + number)
        stats = InputStats.of(len(rows), gram, {}, gram)
        found.append(layer_of(weight + noise * randn(30, 40, seed=30 + number), f"layers.{number}.up", stats))
    return found


def error(layers: list[Layer], weights: list[Weight]) -> float:
    pairs = zip(layers, weights, strict=True)
    return sum(loss((layer.weight - weight.dense()).double(), layer.inputs.gram.double()) for layer, weight in pairs)


def test_by_hand() -> None:
    """The unit matrix, and it with a 3 in one place, differ by a matrix of rank 1."""
    first, second = torch.eye(8), torch.eye(8)
    first[1, 1] = 3.0
    layers = [layer_of(first), layer_of(second)]
    one, two = SHARES.compress(layers, BaseDeltaConfig(rank=1, whiten=False, rounds=1))
    assert isinstance(one, BaseDelta)
    assert torch.allclose(one.dense(), first, atol=1e-6)
    assert torch.allclose(two.dense(), second, atol=1e-6)
    assert one.base is two.base


@pytest.mark.parametrize("count", [2, 3])
def test_no_round_raises_the_error(count: int) -> None:
    layers = blocks(noise=0.3, count=count)
    given = {"rank": 3, "blocks": count, "relative": False}
    errors = [error(layers, SHARES.compress(layers, BaseDeltaConfig(rounds=n, **given))) for n in (1, 2, 8)]
    assert errors[0] > errors[1] > errors[2]


def test_blocks_that_differ_by_little_lose_less_than_with_a_basis_in_the_same_bytes() -> None:
    layers = blocks(noise=0.05)
    weights = SHARES.compress(layers, BaseDeltaConfig(keep=0.7))
    basis = shared_basis.METHOD.shares.compress(layers, shared_basis.SharedBasisConfig(keep=0.7))
    sizes = [
        outline_nbytes(first) + outline_nbytes(second) - outline_nbytes(second.parts()[part])
        for (first, second), part in ((weights, "base"), (basis, "in"))
    ]
    assert sizes[0] <= sizes[1] * 1.02
    assert error(layers, weights) < 0.2 * error(layers, basis)


def test_what_it_would_not_shrink_stays_dense() -> None:
    layers = blocks()
    weights = SHARES.compress(layers, BaseDeltaConfig(rank=20))
    assert all(isinstance(weight, Dense) for weight in weights)
    assert error(layers, weights) == 0
    message, hint = METHOD.check(layers[0].info, BaseDeltaConfig(keep=0.5)) or ("", "")
    assert "leaves nothing beside their base" in message
    assert "0.5" in hint
