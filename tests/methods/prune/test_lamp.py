"""lamp: hand-computed scores, and layers that share a sparsity without losing any of them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from aicompress.layer import Layer
from aicompress.methods.capabilities import Candidate
from aicompress.methods.prune import lamp
from aicompress.methods.prune.lamp import LampConfig, apply, pieces, resolve
from aicompress.weights import Sparse
from tests.methods.layers import candidate_of, layer_of, randn


def scores(layer: Layer, blocks: int = 1) -> Tensor:
    """In ascending order."""
    rows = torch.chunk(layer.weight, blocks)
    read = [partial(replace, layer, weight=block) for block in rows] if blocks > 1 else None
    config = LampConfig(sparsity=0.5)
    parts = pieces(Candidate(layer.info, config, lambda: layer, blocks=read), config)
    return torch.cat([part() for part in parts][::-1])


def test_hand_computed() -> None:
    """Weights that are there have a score above those that are not; of a sparse layer these do not compete."""
    layer = layer_of(torch.tensor([[3.0, -1.0], [0.0, 2.0]]))
    before = layer.weight.clone()
    torch.testing.assert_close(scores(layer), torch.tensor([0.0, 1 / 14, 4 / 13, 1.0]))
    assert torch.equal(layer.weight, before)
    sparse = replace(layer, stored=Sparse.of(layer.weight, layer.weight != 0))
    torch.testing.assert_close(scores(sparse), torch.tensor([1 / 14, 4 / 13, 1.0]))


@pytest.mark.parametrize("weight", [randn(20, 31, seed=3), (2 * randn(20, 31)).round(), torch.ones(20, 31)])
def test_ranges_and_pieces_add_up_as_the_whole(monkeypatch: pytest.MonkeyPatch, weight: Tensor) -> None:
    layer = layer_of(weight)
    whole = scores(layer)
    monkeypatch.setattr(lamp, "PIECE", 7)
    monkeypatch.setattr(lamp, "RANGE", 100)
    assert torch.equal(scores(layer, blocks=3), whole)


def test_zeros_of_an_earlier_step_take_nothing_from_the_others() -> None:
    """A dense layer with zeros among its weights keeps as many as the paper's scores, sorted, say."""
    half = randn(20, 30).masked_fill_(torch.arange(30) % 2 == 0, 0.0)
    layers = [layer_of(half, "layers.0.fc"), layer_of(randn(20, 30, seed=1), "layers.1.fc")]
    config = LampConfig(sparsity=0.7)
    kept = [each.kept for each in resolve([candidate_of(layer, config) for layer in layers], 0)]
    squares = [layer.weight[layer.weight != 0].double().square().sort(descending=True).values for layer in layers]
    scored = torch.cat([each / each.cumsum(0) for each in squares])
    largest = scored.argsort(descending=True, stable=True)[:360]
    assert kept == [int((largest < 300).sum()), int((largest >= 300).sum())]


def test_no_layer_is_pruned_away_however_small_its_weights() -> None:
    layers = [layer_of(scale * randn(20, 30, seed=n), f"layers.{n}.fc") for n, scale in enumerate([1.0, 1e-3, 1e3])]
    config = LampConfig(sparsity=0.95)
    configs = resolve([candidate_of(layer, config) for layer in layers], 0)
    kept = [int((apply(layer, config).dense() != 0).sum()) for layer, config in zip(layers, configs, strict=True)]
    assert sum(kept) == 1800 - round(0.95 * 1800)
    assert kept == [config.kept for config in configs]
    assert max(kept) - min(kept) < 15  # the scale of a layer does not matter


def test_a_layer_of_few_large_weights_keeps_fewer() -> None:
    heavy = layer_of(torch.cat([torch.full((1, 20), 5.0), torch.full((9, 20), 0.01)]), "layers.0.fc")
    even = layer_of(torch.ones(10, 20), "layers.1.fc")
    config = LampConfig(sparsity=0.5)
    few, many = resolve([candidate_of(layer, config) for layer in (heavy, even)], 0)
    assert few.kept is not None
    assert many.kept is not None
    assert few.kept < many.kept
