"""Methods whose codes are entropy-coded meet their target of bits, and lose less than what takes as many."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aicompress.layer import Layer
from aicompress.methods.curvature import gram, loss
from aicompress.methods.quantize.entropy_gptq import EntropyGptqConfig
from aicompress.methods.quantize.gptq import GptqConfig
from aicompress.methods.quantize.rdo import RdoConfig
from aicompress.methods.quantize.watersic import WatersicConfig
from aicompress.methods.registry import get
from aicompress.recipe import load
from aicompress.weights import Weight, entropy_coded, outline_nbytes
from aicompress.weights.decoding import COMPILED
from tests.methods.quantize.layers import gaussian, layer_of


@pytest.fixture(scope="module")
def layer() -> Layer:
    """Correlated inputs, some ten times as large as others."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(128, 128, generator=generator) / 128**0.5 + 0.5 * torch.eye(128)
    spread = torch.exp(0.6 * torch.randn(128, generator=generator))
    return layer_of(gaussian(320, 128), torch.randn(2000, 128, generator=generator) @ mix * spread)


def compressed(layer: Layer, config: Any) -> Weight:
    return get("quantize", config.name).apply(layer, config)  # type: ignore[no-any-return, attr-defined]


def bits(weight: Weight) -> float:
    return 8 * outline_nbytes(entropy_coded(weight)) / (weight.shape[0] * weight.shape[1])


def lost(layer: Layer, config: Any) -> float:
    return loss((compressed(layer, config).dense() - layer.weight).double(), gram(layer))


@pytest.mark.parametrize("kind", [RdoConfig, EntropyGptqConfig, WatersicConfig])
@pytest.mark.parametrize("target", [1.3, 4.0])
def test_the_target_is_met_once_codes_are_coded(layer: Layer, kind: Any, target: float) -> None:
    assert bits(compressed(layer, kind(target_bpw=target))) == pytest.approx(target, rel=0.01)


@pytest.mark.parametrize("kind", [RdoConfig, WatersicConfig])
def test_rounds_the_same_without_numba(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(gaussian(64, 40), torch.randn(200, 40, generator=torch.Generator().manual_seed(0)))
    fast = compressed(layer, kind(target_bpw=2.0)).dense()
    monkeypatch.setitem(COMPILED, "round_uniform", None)
    slow = compressed(layer, kind(target_bpw=2.0)).dense()
    assert (fast - slow).abs().gt(1e-6).float().mean() < 0.01  # sums in another order move few codes


@pytest.mark.parametrize("target", [2.0, 3.0])
def test_a_trellis_comes_close_to_the_bound_of_rate_and_distortion(target: float) -> None:
    """Of a Gaussian, error σ² takes -log2 σ bits at least; entropy-coded uniform codes take 0.25 more."""
    layer = layer_of(gaussian(512, 256))
    above = {}
    for quantizer in ("trellis", "uniform"):
        weight = compressed(layer, RdoConfig(target_bpw=target, quantizer=quantizer, rate=1.0))  # type: ignore[arg-type]
        error = (weight.dense() - layer.weight).square().mean() / layer.weight.square().mean()
        factors = 16 / 256
        above[quantizer] = bits(weight) - factors + 0.5 * float(error.log2())
    assert above["trellis"] < 0.15
    assert above["uniform"] > 0.24


def test_a_trellis_keeps_the_feedback_between_columns(layer: Layer) -> None:
    for kind in (EntropyGptqConfig, WatersicConfig):
        assert lost(layer, kind(target_bpw=2.5, quantizer="trellis")) < 0.92 * lost(layer, kind(target_bpw=2.5))


def test_loses_less_than_codes_of_a_fixed_width(layer: Layer) -> None:
    fixed = GptqConfig(bits=3, group_size=64)
    plain, taken = lost(layer, fixed), bits(compressed(layer, fixed))
    assert lost(layer, EntropyGptqConfig(target_bpw=taken)) < 0.9 * plain
    assert lost(layer, WatersicConfig(target_bpw=taken)) < 0.9 * plain


def test_steps_of_columns_pay_where_the_order_is_the_layers_own(layer: Layer) -> None:
    natural = lost(layer, EntropyGptqConfig(target_bpw=2.0, order="natural"))
    assert lost(layer, WatersicConfig(target_bpw=2.0)) < 0.9 * natural


def test_counting_bits_pays_where_errors_are_moved_and_bits_are_few(layer: Layer) -> None:
    counted = lost(layer, EntropyGptqConfig(target_bpw=1.5))
    assert counted < 0.9 * lost(layer, EntropyGptqConfig(target_bpw=1.5, rate=0.0))


def test_weighted_errors_are_those_of_the_output(layer: Layer) -> None:
    def error(config: RdoConfig) -> float:
        off = (compressed(layer, config).dense() - layer.weight).square()
        return float((off * gram(layer).diagonal()).sum())

    assert error(RdoConfig(target_bpw=2.0, weighted=True)) < 0.97 * error(RdoConfig(target_bpw=2.0))


@pytest.mark.parametrize("quantizer", ["uniform", "trellis"])
def test_one_input_far_above_all_others_is_not_clipped(quantizer: Any) -> None:
    """Its column gets a step so fine that codes of eight bits would not reach its largest weights."""
    inputs = torch.randn(600, 256, generator=torch.Generator().manual_seed(0))
    inputs[:, 5] *= 1000
    layer = layer_of(gaussian(64, 256), inputs)
    fine = lost(layer, WatersicConfig(target_bpw=3.0, quantizer=quantizer))
    assert fine < 0.01 * lost(layer, RdoConfig(target_bpw=3.0, quantizer=quantizer))


@pytest.mark.parametrize("kind", [RdoConfig, EntropyGptqConfig])
def test_a_weight_far_above_all_others_is_not_clipped(kind: Any) -> None:
    """One step for a layer leaves its code out of eight bits; all other rows keep that step."""
    plain = gaussian(96, 128)
    large = plain.clone()
    large[7, 30] = 300 * float(plain.square().mean().sqrt())
    inputs = torch.randn(400, 128, generator=torch.Generator().manual_seed(0))
    off = compressed(layer_of(large, inputs), kind(target_bpw=3.0)).dense() - large
    assert float(off[7, 30].abs()) < 0.01 * float(large[7, 30])
    others = torch.arange(96) != 7
    usual = compressed(layer_of(plain, inputs), kind(target_bpw=3.0)).dense() - plain
    assert off[others].square().mean() < 1.1 * usual[others].square().mean()


def test_codes_are_entropy_coded_unless_the_recipe_says_otherwise() -> None:
    assert load("quantize/rdo-3bpw", "quantize").storage == "entropy"
    assert load("quantize/rdo-3bpw", "quantize", ["storage=fixed"]).storage == "fixed"
    assert load("quantize/rtn-w4", "quantize").storage is None


@pytest.mark.parametrize("kind", [RdoConfig, EntropyGptqConfig, WatersicConfig])
def test_a_layer_whose_factors_take_all_bits_is_not_erased(kind: Any) -> None:
    for shape in ((12, 1), (1, 12), (2, 16)):
        layer = layer_of(gaussian(*shape), torch.randn(60, shape[1], generator=torch.Generator().manual_seed(0)))
        assert lost(layer, kind(target_bpw=3.0)) < 0.6 * loss(layer.weight.double(), gram(layer))
