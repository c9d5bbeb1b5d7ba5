"""shared_basis: the basis of the sum of Gram matrices, what it wins where blocks are alike, and who shares."""

from __future__ import annotations

import pytest
import torch

from aicompress.layer import Layer
from aicompress.methods.curvature import loss
from aicompress.methods.factorize import whitened
from aicompress.methods.factorize.shared_basis import METHOD, SharedBasisConfig
from aicompress.methods.factorize.weighting.roots import Root, Weighting
from aicompress.statistics import InputStats
from aicompress.weights import LowRank, outline_nbytes
from tests.methods.layers import candidate_of, layer_of, randn

SHARES = METHOD.shares
assert SHARES is not None


def blocks(common: int) -> list[Layer]:
    """The same layer of two blocks whose inputs differ, and whose rows are of a few common directions."""
    found = []
    for number in (0, 1):
        rows = randn(300, 40, seed=number) * torch.logspace(0, -1, 40).roll(5 * number)
        gram = rows.t() @ rows / len(rows)
        stats = InputStats.of(len(rows), gram, {}, gram)
        weight = randn(40, common, seed=8 + number) @ randn(common, 40, seed=7)
        found.append(layer_of(weight, f"layers.{number}.up", stats))
    return found


def test_the_basis_is_of_the_sum_of_gram_matrices() -> None:
    """Σ_{i>r} σ_i² is the error of both layers under H_0 + H_1."""
    layers = blocks(40)
    total = layers[0].inputs.gram + layers[1].inputs.gram
    squares = Weighting(Root.of(total, 0.0)).squares(torch.cat([layer.weight for layer in layers]))
    weights = SHARES.compress(layers, SharedBasisConfig(rank=9, damping=0, relative=False))
    assert all(isinstance(weight, LowRank) and weight.inner is weights[0].inner for weight in weights)
    off = torch.cat([layer.weight - weight.dense() for layer, weight in zip(layers, weights, strict=True)])
    assert loss(off.double(), total.double()) == pytest.approx(float(squares[9:].sum()), rel=1e-3)


def test_blocks_that_are_alike_lose_less_in_the_same_bytes() -> None:
    def error(layers: list[Layer], weights: list[LowRank]) -> float:
        pairs = zip(layers, weights, strict=True)
        return sum(loss(layer.weight - weight.dense(), layer.inputs.gram) for layer, weight in pairs)

    layers = blocks(14)
    apart = [whitened.METHOD.apply(layer, whitened.WhitenedConfig(keep=0.5)) for layer in layers]
    together = SHARES.compress(layers, SharedBasisConfig(keep=0.5))
    stored = outline_nbytes(together[0]) + outline_nbytes(together[1].parts()["out"])
    assert stored <= sum(outline_nbytes(weight) for weight in apart)
    assert error(layers, together) < 0.5 * error(layers, apart)


def test_who_shares() -> None:
    """Contiguous blocks, as many as each layer's config says; the last one may be alone."""
    names = [f"h.{depth}.{part}" for depth in range(5) for part in ("up", "down")]
    shapes = {"up": (6, 4), "down": (4, 6)}

    def groups(size: dict[str, int]) -> list[list[str]]:
        layers = [layer_of(torch.ones(shapes[name.rpartition(".")[2]]), name) for name in names]
        configs = [SharedBasisConfig(keep=0.5, blocks=size[name.rpartition(".")[2]]) for name in names]
        found = SHARES.groups([candidate_of(*pair) for pair in zip(layers, configs, strict=True)])
        return [[names[number] for number in group] for group in found]

    assert groups({"up": 2, "down": 1}) == [["h.0.up", "h.1.up"], ["h.2.up", "h.3.up"]]
    assert groups({"up": 1, "down": 3}) == [["h.0.down", "h.1.down", "h.2.down"], ["h.3.down", "h.4.down"]]
