"""tie: which layers are alike, and what they become."""

from __future__ import annotations

import torch

from aicompress.methods.factorize.tie import METHOD, TieConfig
from aicompress.weights import Tied
from tests.methods.layers import candidate_of, layer_of, randn

SHARES = METHOD.shares
assert SHARES is not None


def test_layers_within_the_threshold_of_the_first_are_alike() -> None:
    """1, 1.04 and 1.08 times one matrix: the last is near the second, and too far from the first."""
    layers = [layer_of(factor * randn(80, 90)) for factor in (1.0, 1.04, 1.08)]
    layers += [layer_of(randn(80, 90, seed=1)), layer_of(randn(90, 80)), layer_of(randn(80, 90).half())]
    for threshold, alike in ((0.05, [[0, 1]]), (0.1, [[0, 1, 2]]), (0.0, [])):
        config = TieConfig(threshold=threshold)
        assert SHARES.groups([candidate_of(layer, config) for layer in layers]) == alike


def test_one_number_that_no_sample_sees_keeps_layers_apart() -> None:
    layers = [layer_of(randn(100, 101)), layer_of(randn(100, 101).index_fill(1, torch.tensor([1]), 0.0))]
    layers[1].weight[:, 1] = layers[0].weight[:, 1]
    assert SHARES.groups([candidate_of(layer, TieConfig()) for layer in layers]) == [[0, 1]]
    layers[1].weight[0, 1] += 1e-3
    assert SHARES.groups([candidate_of(layer, TieConfig()) for layer in layers]) == []


def test_the_mean_is_as_far_from_both() -> None:
    layers = [layer_of(torch.full((2, 3), value)) for value in (1.0, 1.5)]
    first, second = SHARES.compress(layers, TieConfig(threshold=0.5, value="mean"))
    assert isinstance(second, Tied)
    for weight in (first, second):
        assert torch.equal(weight.dense(), torch.full((2, 3), 1.25))
