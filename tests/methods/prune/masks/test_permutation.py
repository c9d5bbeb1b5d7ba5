"""Permuted N:M groups keep more, and what is stored is the same weight in its own order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aicompress.layer import Layer
from aicompress.methods import get
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.prune.masks.masks import pattern_mask
from aicompress.methods.prune.masks.permutation import kept_scores, regrouped
from aicompress.statistics import GradientStats, InputStats
from aicompress.weights import Dense, Sparse, restore
from tests.methods.layers import layer_of, randn

METHODS = ["magnitude", "wanda", "sparsegpt", "alps", "taylor"]


def layer() -> Layer:
    """Columns of very unlike sizes, the large ones side by side: the worst case for groups of neighbours."""
    sizes = torch.where(torch.arange(48) < 24, 3.0, 0.3)
    inputs = randn(200, 48, seed=1)
    gram = inputs.t() @ inputs / 200
    samples = randn(5, 64, 48, seed=2)
    moments = GradientStats(5, samples.mean(0), samples.square().mean(0))
    stats = InputStats.of(200, gram, {})
    return layer_of(randn(64, 48) * sizes, inputs=stats, gradients=moments)


def pruned(name: str, **fields: Any) -> Any:
    method = get("prune", name)
    assert isinstance(method, LayerMethod)
    config = method.config.model_validate({"name": name, "pattern": "2:4", **fields})
    weight = method.apply(layer(), config)
    assert method.outline(layer().info, config).specs() == weight.specs()
    return weight


def test_large_columns_are_dealt_out() -> None:
    scores = layer().weight.square()
    order = regrouped([lambda: scores], 64, 2, 4, 20, 0)
    assert sorted(order.tolist()) == list(range(48))
    best = scores.flatten().topk(scores.numel() // 2).values.sum()
    own, found = (kept / float(best) for kept in kept_scores([lambda: scores], [torch.arange(48), order], 2, 4))
    assert own < 0.9
    assert found > 0.95


def test_swaps_beat_the_first_order_and_none_is_worse_than_its_own() -> None:
    scores = randn(32, 64).square()
    blocks = [lambda: scores[:9], lambda: scores[9:]]
    orders = [regrouped(blocks, 32, 2, 4, rounds, 0) for rounds in (1, 10, 40)]
    kept = kept_scores(blocks, [torch.arange(64), *orders], 2, 4)
    assert kept[0] <= kept[1] < kept[2] < kept[3]


@pytest.mark.parametrize("name", METHODS)
def test_less_is_lost_and_the_mask_is_packed_in_the_found_order(name: str) -> None:
    plain, found = pruned(name, store="sparse"), pruned(name, store="sparse", permutation=20)
    assert isinstance(found, Sparse)
    assert found.grouping is not None
    assert found.grouping.order is not None
    in_order = found.mask[:, found.grouping.order.long()]
    assert (in_order.reshape(-1, 4).sum(dim=1) == 2).all()
    again = restore(found.tensors(), found.meta())
    assert torch.equal(again.dense(), found.dense())
    errors = [_error(layer(), weight.dense(), name) for weight in (plain, found)]
    assert errors[1] < 0.8 * errors[0]


def _error(whole: Layer, weight: Tensor, name: str) -> float:
    """By what the method's mask goes by: the loss where it reads gradients, else the outputs."""
    change = whole.weight - weight
    if name == "taylor":
        assert whole.gradients is not None
        return float((change.square() * whole.gradients.square).sum())
    if name == "magnitude":
        return float(change.square().sum())
    assert whole.inputs is not None
    assert whole.inputs.gram is not None
    return float(((change @ whole.inputs.gram) * change).sum())


def test_dense_storage_is_in_the_weight_s_own_order() -> None:
    found = pruned("magnitude", permutation=20)
    assert isinstance(found, Dense)
    kept = found.matrix != 0
    assert torch.equal(found.matrix[kept], layer().weight[kept])
    assert not torch.equal(kept, pattern_mask(layer().weight.abs(), 2, 4))


def test_it_belongs_to_patterns_of_dense_weights() -> None:
    method = get("prune", "wanda")
    assert isinstance(method, LayerMethod)
    with pytest.raises(ValueError, match="permutation needs pattern"):
        method.config.model_validate({"name": "wanda", "sparsity": 0.5, "permutation": 3})
    config = method.config.model_validate({"name": "wanda", "pattern": "2:4", "permutation": 3})
    sparse = layer_of(Sparse.of(randn(8, 16), randn(8, 16) > 0))
    refusal = method.check(sparse.info, config)
    assert refusal is not None
    assert "permutation" in refusal[0]
