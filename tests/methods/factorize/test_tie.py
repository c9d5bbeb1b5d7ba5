"""tie: which layers are alike, and what they become."""

from __future__ import annotations

from dataclasses import replace

import torch

from aicompress.methods.factorize.tie import METHOD, TieConfig
from aicompress.methods.quantize.rtn import METHOD as RTN
from aicompress.weights import Dense, LowRank, Tied
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


def test_equal_codes_are_tied_in_their_form() -> None:
    """Codes of one matrix are those of another with the same codes, and never a plain matrix of the same numbers."""
    config = RTN.config(name="rtn", bits=4, group_size=16)  # type: ignore[call-arg]
    codes = [layer_of(RTN.apply(layer_of(randn(32, 32, seed=seed)), config)) for seed in (0, 0, 1)]
    layers = [*codes, layer_of(codes[0].weight), layer_of(codes[0].weight.t().contiguous())]
    assert SHARES.groups([candidate_of(layer, TieConfig()) for layer in layers]) == [[0, 1]]
    first, second = SHARES.compress(codes[:2], TieConfig())
    assert first is codes[0].stored
    assert isinstance(second, Tied)
    outlines = SHARES.outline([layer.info for layer in codes[:2]], TieConfig())
    assert [each.specs() for each in outlines] == [first.specs(), second.specs()]
    refused = METHOD.check(codes[0].info, TieConfig(value="mean"))
    assert refused is not None
    assert "has no mean" in refused[0]
    assert METHOD.check(codes[0].info, TieConfig()) is None


def test_parts_of_a_stored_weight_are_not_tied() -> None:
    layer = layer_of(LowRank(Dense(randn(16, 2)), Dense(randn(2, 16))))
    assert METHOD.suits(layer.info)
    assert not METHOD.suits(replace(layer.info, part="in"))
