from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aicompress.errors import CompressError
from aicompress.layer import Layer
from aicompress.methods.quantize.imatrix import ImatrixConfig, apply
from aicompress.methods.quantize.rtn import RtnConfig
from aicompress.methods.quantize.rtn import apply as rtn
from aicompress.statistics import InputStats
from aicompress.weights import IntGrouped
from tests.methods.quantize.layers import correlated, gaussian, layer_of


def weighted(layer: Layer, found: Tensor) -> float:
    assert layer.inputs is not None
    assert layer.inputs.norms is not None
    return float(((layer.weight - found).square() * layer.inputs.norms).sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["group", "channel", "tensor"])
def test_no_worse_than_the_unweighted_search(bits: int, symmetric: bool, granularity: str) -> None:
    layer = layer_of(gaussian(32, 64), correlated(200, 64))
    shared = {"bits": bits, "group_size": 16, "symmetric": symmetric, "granularity": granularity}
    plain = rtn(layer, RtnConfig(range="mse", **shared)).dense()  # type: ignore[arg-type]
    assert weighted(layer, apply(layer, ImatrixConfig(**shared)).dense()) <= weighted(layer, plain)  # type: ignore[arg-type]


def test_by_hand_the_column_that_matters_is_exact() -> None:
    """Only the second input is ever large: the scale fits 0.3, and the large weight beside it is clipped or off."""
    weight = torch.tensor([[1.0, 0.3, 0.0, 0.0]])
    layer = layer_of(weight)
    norms = torch.tensor([1e-3, 1.0, 1e-3, 1e-3])
    found = apply(
        Layer(layer.info, weight, None, InputStats(9, columns={"norms": norms})),
        ImatrixConfig(bits=2, granularity="channel"),
    )
    assert found.dense()[0, 1] == pytest.approx(0.3, rel=5e-3)


def test_a_negative_scale_gives_the_long_side_of_the_range_to_positive_weights() -> None:
    """At 2 bits codes are -2 to 1; (2, 1, 0, -1) needs them negated."""
    weight = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    found = apply(layer_of(weight, torch.eye(4)), ImatrixConfig(bits=2, granularity="channel"))
    assert isinstance(found, IntGrouped)
    assert found.scale.tolist() == [[-1.0]]
    assert torch.equal(found.dense(), weight)


def test_no_tokens() -> None:
    layer = layer_of(gaussian(2, 64))
    with pytest.raises(CompressError, match="no calibration token"):
        apply(Layer(layer.info, layer.weight, None, InputStats(0)), ImatrixConfig())
