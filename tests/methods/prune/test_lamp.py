"""lamp: hand-computed scores, and layers that share a sparsity without losing any of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aicompress.methods.prune import lamp
from aicompress.methods.prune.lamp import LampConfig, apply, resolve, scores
from aicompress.weights import Sparse
from tests.methods.layers import candidate_of, layer_of, randn


def test_hand_computed() -> None:
    """In ascending order; of a sparse layer where they are."""
    layer = layer_of(torch.tensor([[3.0, -1.0], [0.0, 2.0]]))
    before = layer.weight.clone()
    torch.testing.assert_close(scores(layer, LampConfig(sparsity=0.5)), torch.tensor([[0.0, 1 / 14], [4 / 13, 1.0]]))
    assert torch.equal(layer.weight, before)
    sparse = replace(layer, stored=Sparse.of(layer.weight, layer.weight != 0))
    torch.testing.assert_close(scores(sparse, LampConfig(sparsity=0.5)), torch.tensor([[1.0, 1 / 14], [0.0, 4 / 13]]))


def test_pieces_add_up_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(randn(20, 31, seed=3))
    whole = scores(layer, LampConfig(sparsity=0.5)).clone()
    monkeypatch.setattr(lamp, "PIECE", 7)
    assert torch.equal(scores(layer, LampConfig(sparsity=0.5)), whole)


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
