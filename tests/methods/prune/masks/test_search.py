"""Pattern search: each layer gets the pattern that its weights are made for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aicompress.layer import Layer
from aicompress.methods.prune import wanda
from aicompress.methods.prune.masks.candidates import explicit, fitting
from aicompress.methods.prune.masks.search import least, saved_bytes
from aicompress.methods.prune.masks.sparsity import check
from aicompress.methods.prune.wanda import WandaConfig
from aicompress.statistics import InputStats
from aicompress.weights import Sparse
from tests.methods.layers import layer_of, randn

CANDIDATES = ("unstructured", "2:4", "1x4", "4x1")


def config_of(**fields: Any) -> WandaConfig:
    given = {"name": "wanda", "pattern": "search", "candidates": CANDIDATES, "refit": False, "scope": "layer"}
    return WandaConfig.model_validate({**given, **fields})


def layer(weight: Tensor) -> Layer:
    gram = torch.eye(weight.shape[1])
    return layer_of(weight, inputs=InputStats.of(99, gram, {}))


def picked(weight: Tensor, **fields: Any) -> str:
    config = config_of(**fields)
    found = layer(weight)
    options = fitting(found.info, config, check)
    chosen = options[least(found, options, wanda.apply)]
    return str(chosen.pattern or chosen.block or "unstructured")


def spread(pattern: Tensor) -> Tensor:
    """Large where the pattern is set, small elsewhere."""
    return torch.where(pattern, 1.0 + randn(16, 32).abs(), 0.01 * randn(16, 32, seed=1))


def test_each_pattern_is_found_where_it_fits() -> None:
    """Two of four cost less bytes than a bit mask; a block that a mask is made of loses what does not lie in blocks."""
    two_of_four = torch.arange(32).expand(16, 32) % 4 < 2
    columns = (randn(4, 32, seed=2) > randn(4, 32, seed=2).median()).repeat_interleave(4, 0)
    assert picked(spread(two_of_four)) == "2:4"
    assert picked(spread(columns)) == "unstructured"  # the same mask as 4x1, which is named later
    assert picked(spread(columns), candidates=("2:4", "1x4", "4x1")) == "4x1"
    assert picked(spread(columns.t().reshape(16, 8, 4).amax(2).repeat_interleave(4, 1)[:, :32]),
                  candidates=("4x1", "1x4")) == "1x4"  # fmt: skip


def test_less_is_lost_per_byte_than_by_any_other() -> None:
    found, config = layer(randn(16, 32)), config_of()
    options = fitting(found.info, config, check)
    rates = []
    for option in options:
        weight = wanda.apply(found, option.model_copy(update={"store": "auto"}))
        rates.append(float((found.weight - weight.dense()).square().sum()) / saved_bytes(found, weight))
    assert least(found, options, wanda.apply) == rates.index(min(rates))


def test_where_nothing_is_saved_the_least_loss_decides() -> None:
    found, config = layer(randn(16, 32)), config_of()
    options = fitting(found.info, config, check)
    chosen = options[least(found, options, wanda.apply, lambda layer, weight: 0.0)]
    assert chosen.pattern is None
    assert chosen.block is None


def test_candidates_that_do_not_fit_are_left_out() -> None:
    odd = layer(randn(6, 7))
    assert [each.sparsity for each in fitting(odd.info, config_of(), check)] == [0.5]
    refusal = wanda.METHOD.check(odd.info, config_of(candidates=("2:4", "4x1")))
    assert refusal is not None
    assert "does not fit" in refusal[0]
    sparse = layer_of(Sparse.of(randn(8, 16), randn(8, 16) > 0))
    refusal = wanda.METHOD.check(sparse.info, config_of())
    assert refusal is not None
    assert "sparse already" in refusal[0]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"candidates": ("2:4", "2x")}, "'2x' is not"),
        ({"candidates": ()}, "belong together"),
        ({"pattern": "2:4", "scope": "row"}, "belong together"),
    ],
)
def test_refused_parameters(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config_of(**fields)


def test_explicit_configs() -> None:
    config = config_of(searched=0.75)
    assert explicit(config, "2:4").model_dump()["pattern"] == "2:4"
    assert explicit(config, "16x1").block == "16x1"
    assert explicit(config, "unstructured").sparsity == 0.75
    assert all(explicit(config, each).open == "uniform" for each in CANDIDATES)
