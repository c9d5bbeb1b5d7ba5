from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aicompress.checkpoint.layouts import candidates
from aicompress.methods.quantize.hqq import HqqConfig, apply
from aicompress.methods.quantize.rtn import RtnConfig
from aicompress.methods.quantize.rtn import apply as rtn
from aicompress.weights import IntGrouped
from tests.methods.quantize.layers import gaussian, layer_of


def p_norm(error: Tensor, power: float) -> float:
    return float(error.abs().pow(power).sum())


def test_by_hand_zero_iterations_are_the_full_range() -> None:
    """(-1, 0, 1, 2) in 2 bits: scale 1, zero -2 + 1 = -1, codes -2 to 1."""
    weight = torch.tensor([[-1.0, 0.0, 1.0, 2.0]])
    found = apply(layer_of(weight), HqqConfig(bits=2, granularity="channel", iterations=0))
    assert isinstance(found, IntGrouped)
    assert found.zero is not None
    assert (found.scale.tolist(), found.zero.tolist(), found.codes.tolist()) == ([[1.0]], [[-1.0]], [[-2, -1, 0, 1]])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("power", [0.5, 0.7, 1.0])
@pytest.mark.parametrize("shape", [1, 3])  # Gaussian, and with heavy tails
def test_never_worse_than_round_to_nearest_in_its_own_norm(bits: int, power: float, shape: int) -> None:
    layer = layer_of(gaussian(32, 64).pow(shape))
    plain = rtn(layer, RtnConfig(bits=bits, group_size=32, symmetric=False)).dense()  # type: ignore[arg-type]
    found = apply(layer, HqqConfig(bits=bits, group_size=32, power=power)).dense()  # type: ignore[arg-type]
    assert p_norm(layer.weight - found, power) <= p_norm(layer.weight - plain, power)


def test_more_iterations_are_never_worse() -> None:
    layer = layer_of(gaussian(32, 64))
    found = [apply(layer, HqqConfig(bits=3, group_size=32, iterations=n)).dense() for n in (0, 1, 5, 20)]
    errors = [p_norm(layer.weight - dense, 0.7) for dense in found]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_real_zero_points_are_stored_in_the_native_layout() -> None:
    layer = layer_of(gaussian(8, 64))
    weights = {"w": (layer.info, apply(layer, HqqConfig()))}
    assert candidates(weights, has_config=True) == [("native", False)]


def test_a_line_is_recovered() -> None:
    """Values on an even grid that does not hold 0 fit exactly; integer zero points could not do that."""
    weight = 5.3 + 0.25 * torch.arange(16.0).repeat(4, 4)
    found = apply(layer_of(weight), HqqConfig(bits=4, group_size=64, iterations=100, scale_dtype="float32")).dense()
    assert (found - weight).abs().max() < 1e-5


def test_far_better_than_round_to_nearest_at_two_bits() -> None:
    layer = layer_of(gaussian(64, 128))
    plain = rtn(layer, RtnConfig(bits=2, group_size=64, symmetric=False)).dense()
    found = apply(layer, HqqConfig(bits=2)).dense()
    assert p_norm(layer.weight - found, 0.7) < 0.85 * p_norm(layer.weight - plain, 0.7)
    assert p_norm(layer.weight - found, 2) < 0.7 * p_norm(layer.weight - plain, 2)
