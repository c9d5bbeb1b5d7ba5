"""awq: factors that follow the activations, and the better for it where some channels stand out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from aicompress.layer import Layer
from aicompress.methods.capabilities import ScalingFactors
from aicompress.methods.curvature import loss
from aicompress.methods.quantize import awq
from aicompress.methods.quantize.awq import AwqConfig
from aicompress.statistics import InputStats
from tests.methods.layers import candidate_of
from tests.methods.quantize.layers import gaussian, layer_of


def same(factors: Tensor) -> Tensor:
    return factors


def outlying(columns: int = 64, tokens: int = 400) -> Tensor:
    """Inputs of which every eighth channel is twenty times as large."""
    size = torch.ones(columns)
    size[::8] = 20
    return gaussian(tokens, columns, seed=3) * size


def balanced(layers: list[Layer], **fields: Any) -> ScalingFactors | None:
    config = AwqConfig(**{"group_size": 32, **fields})
    return awq.scaling_factors([candidate_of(layer, config) for layer in layers], same)


def error(layer: Layer, factors: Tensor, **fields: Any) -> float:
    """Output error of the whole method with given factors."""
    assert layer.inputs is not None
    assert layer.inputs.gram is not None
    moved = Layer(layer.info, layer.weight * factors, None, layer.inputs.divided(factors))
    found = awq.apply(moved, AwqConfig(**{"group_size": 32, **fields})).dense() / factors
    return loss(layer.weight - found, layer.inputs.gram.double())


@pytest.mark.parametrize("base", ["rtn", "imatrix", "gptq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_salient_channels_are_rounded_finely(base: str, symmetric: bool) -> None:
    layer = layer_of(gaussian(48, 64), outlying())
    fields: dict[str, Any] = {"bits": 3, "symmetric": symmetric, "base": {"name": base}}
    found = balanced([layer], **fields)
    assert found is not None
    assert found.factors[::8].min() > found.factors[1:8].max()
    assert error(layer, found.factors, **fields) < (0.7 if base == "rtn" else 1) * error(
        layer, torch.ones(64), **fields
    )


def test_the_search_is_over_all_layers_of_an_input() -> None:
    """Its error is the sum over both, and no other exponent of the grid has less."""
    layers = [layer_of(gaussian(24, 64, seed=seed), outlying()) for seed in (1, 2)]
    fields: dict[str, Any] = {"bits": 3, "base": {"name": "rtn"}, "steps": 5}
    found = balanced(layers, **fields)
    assert found is not None
    size = awq.mean_abs(layers)
    sums = [sum(error(layer, awq.scaled_to(size, k / 5), **fields) for layer in layers) for k in range(6)]
    best = min(range(6), key=sums.__getitem__)
    torch.testing.assert_close(found.factors, awq.scaled_to(size, best / 5))
    assert found.note.endswith(f"{best / 5:.2f}")


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 20, 37])
def test_the_least_error_is_found_without_trying_all(steps: int) -> None:
    tried: list[int] = []

    def seen(step: int, best: int) -> float:
        tried.append(step)
        return float("nan") if step == steps and best < steps else abs(step - best) + 1.0

    for best in range(steps + 1):
        tried.clear()
        assert awq.least(steps, lambda step, best=best: seen(step, best)) == best  # type: ignore[misc]
        assert len(tried) == len(set(tried)) <= steps // awq.COARSE + 2 * awq.COARSE
    assert awq.least(steps, lambda step: 1.0) == 0


def test_factors_by_hand() -> None:
    """Means 1, 4, 16: powers 1, 2, 4 at one half, divided by √(4 · 1)."""
    assert awq.scaled_to(torch.tensor([1.0, 4.0, 16.0]), 0.5).tolist() == [0.5, 1.0, 2.0]
    assert awq.scaled_to(torch.zeros(3), 0.5).tolist() == [1.0, 1.0, 1.0]
    assert torch.isfinite(awq.scaled_to(torch.tensor([0.0, 4.0]), 1.0)).all()


def test_inputs_of_one_size_are_left_alone() -> None:
    layer = layer_of(gaussian(16, 64), torch.ones(50, 64))
    assert balanced([layer]) is None


def test_layers_that_saw_nothing_do_not_vote() -> None:
    seen = layer_of(gaussian(16, 64), outlying())
    unseen = Layer(seen.info, gaussian(16, 64, seed=9), None, InputStats(0))
    both, one = balanced([seen, unseen], bits=3), balanced([seen], bits=3)
    assert both is not None
    assert one is not None
    assert torch.equal(both.factors, one.factors)
    assert balanced([unseen]) is None


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ({"name": "nf4"}, "rtn, imatrix, gptq"),
        ({}, "rtn, imatrix, gptq"),
        ({"name": "gptq", "bits": 3}, "beside base"),
        ({"name": "gptq", "dampling": 1}, "dampling"),
    ],
)
def test_what_a_base_may_be(base: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        AwqConfig(base=base)
