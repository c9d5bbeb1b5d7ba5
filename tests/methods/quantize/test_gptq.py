from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from aicompress.errors import CompressError
from aicompress.layer import Layer
from aicompress.methods import get
from aicompress.methods.curvature import loss
from aicompress.methods.quantize import gptq
from aicompress.methods.quantize.gptq import GptqConfig, apply, batched
from aicompress.methods.quantize.grid import columns
from aicompress.methods.quantize.grid.coordinate_descent import _normal_matrices
from aicompress.methods.quantize.rtn import RtnConfig
from aicompress.methods.quantize.rtn import apply as rtn
from aicompress.statistics import InputStats
from aicompress.weights import IntGrouped
from tests.methods.quantize.layers import correlated, gaussian, layer_of

PLAIN: dict[str, Any] = {"range": "minmax", "order": "natural", "refine": 0}


def codes(layer: Layer, **fields: object) -> IntGrouped:
    weight = apply(layer, GptqConfig(**fields))  # type: ignore[arg-type]
    assert isinstance(weight, IntGrouped)
    return weight


def output_error(layer: Layer, found: Tensor) -> float:
    assert layer.inputs is not None
    assert layer.inputs.gram is not None
    return loss(layer.weight - found, layer.inputs.gram.double())


def test_by_hand() -> None:
    """Two columns with H = [[1, 1/2], [1/2, 1]], scale 1: 0.4 rounds to 0; its error pushes 0.45 to 0.65, so to 1.

    With C upper and H⁻¹ = CᵀC, C_01 / C_00 = (H⁻¹)_01 / (H⁻¹)_00 = -1/2: the second column gets +0.4 / 2.
    """
    weight = torch.tensor([[0.4, 0.45, 0.0], [0.0, 0.0, 7.5]])
    gram = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]])
    layer = layer_of(weight)
    layer = Layer(layer.info, weight, None, InputStats(10, gram))
    found = codes(layer, granularity="tensor", damping=1e-9, scale_dtype="float32", **PLAIN)
    assert float(found.scale) == 1
    assert found.codes.tolist() == [[0, 1, 0], [0, 0, 7]]


@pytest.mark.parametrize("symmetric", [True, False])
def test_white_inputs_give_round_to_nearest(symmetric: bool) -> None:
    weight = gaussian(24, 32)
    layer = layer_of(weight)
    layer = Layer(layer.info, weight, None, InputStats(100, torch.eye(32)))
    shared = {"bits": 3, "group_size": 16, "symmetric": symmetric}
    found = codes(layer, order="importance", range="minmax", refine=0, **shared)
    nearest = rtn(layer, RtnConfig(**shared))  # type: ignore[arg-type]
    assert torch.equal(found.dense(), nearest.dense())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["group", "channel", "tensor"])
def test_beats_round_to_nearest_on_correlated_inputs(bits: int, symmetric: bool, granularity: str) -> None:
    layer = layer_of(gaussian(48, 64), correlated(256, 64))
    shared = {"bits": bits, "group_size": 16, "symmetric": symmetric, "granularity": granularity}
    plain = output_error(layer, rtn(layer, RtnConfig(**shared)).dense())  # type: ignore[arg-type]
    found = output_error(layer, codes(layer, range="minmax", refine=0, **shared).dense())
    assert found < plain
    assert output_error(layer, codes(layer, range="weighted", refine=3, **shared).dense()) < found


def test_blocks_do_not_change_the_result() -> None:
    """The halving is GPTQ's plain loop over columns in another order of additions."""
    layer = layer_of(gaussian(8, 80), correlated(400, 80))
    found = codes(layer, bits=4, group_size=80, damping=0.01, **PLAIN)
    assert layer.inputs is not None
    assert layer.inputs.gram is not None
    h = layer.inputs.gram.double()
    h = h + 0.01 * h.diagonal().mean() * torch.eye(80)
    c = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    w, scale = layer.weight.double().clone(), found.scale.double()[:, 0]
    for i in range(80):
        value = (w[:, i] / scale).round().clamp(-8, 7) * scale
        error = (w[:, i] - value) / c[i, i]
        w[:, i:] -= error[:, None] * c[i, i:]
        w[:, i] = value
    assert (w.float() - found.dense()).abs().max() < 1e-5


@pytest.mark.parametrize("granularity", ["group", "channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compiled_passes_give_the_same_codes(
    monkeypatch: pytest.MonkeyPatch, granularity: Any, symmetric: bool
) -> None:
    layer = layer_of(gaussian(13, 80), correlated(400, 80))
    found = codes(layer, bits=4, group_size=16, granularity=granularity, symmetric=symmetric)
    monkeypatch.setattr(columns, "compiled", lambda function: None)
    plain = codes(layer, bits=4, group_size=16, granularity=granularity, symmetric=symmetric)
    assert torch.equal(found.codes, plain.codes)
    assert torch.equal(found.scale, plain.scale)


def test_refine_never_raises_the_loss() -> None:
    layer = layer_of(gaussian(32, 64), correlated(256, 64))
    errors = [output_error(layer, codes(layer, bits=2, damping=1e-6, refine=n).dense()) for n in range(5)]
    assert all(after <= before * (1 + 1e-4) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


def test_shifted_target_makes_up_for_changed_inputs() -> None:
    """With x̃ from the uncompressed model, E‖W x̃ − Ŵ x‖² is lower than without knowing it."""
    weight, original = gaussian(32, 48), correlated(512, 48)
    changed = original + 0.5 * correlated(512, 48, seed=9)
    with_cross = apply(layer_of(weight, changed, original), GptqConfig(group_size=16, shift=1)).dense()
    without = apply(layer_of(weight, changed), GptqConfig(group_size=16)).dense()
    wanted = original @ weight.t()
    assert (wanted - changed @ with_cross.t()).square().sum() < (wanted - changed @ without.t()).square().sum()


def test_equal_inputs_shift_nothing() -> None:
    weight, inputs = gaussian(16, 32), correlated(128, 32)
    layer = layer_of(weight, inputs, inputs)
    assert torch.equal(codes(layer, group_size=16, shift=1).dense(), codes(layer, group_size=16, shift=0).dense())


def test_a_shift_without_the_original_inputs_is_refused() -> None:
    with pytest.raises(CompressError, match="uncompressed model's"):
        codes(layer_of(gaussian(16, 32), correlated(128, 32)), group_size=16, shift=0.5)


def test_singular_gram_and_dead_columns() -> None:
    inputs = correlated(10, 64)  # rank 10
    inputs[:, [3, 40]] = 0
    layer = layer_of(gaussian(16, 64), inputs)
    found = codes(layer, bits=4, group_size=32, damping=1e-9, refine=2).dense()
    assert torch.isfinite(found).all()
    nearest = codes(layer, bits=4, group_size=32, range="minmax").dense()
    assert (nearest - layer.weight)[:, [3, 40]].abs().max() < 0.5


def test_zero_row_stays_zero_and_one_row_works() -> None:
    weight = gaussian(4, 64)
    weight[2] = 0
    found = codes(layer_of(weight, correlated(100, 64)), bits=2, refine=2).dense()
    assert found[2].abs().max() == 0
    assert torch.isfinite(codes(layer_of(weight[:1], correlated(100, 64)), bits=2, refine=2).dense()).all()


def test_no_tokens_is_an_error_not_noise() -> None:
    layer = layer_of(gaussian(4, 64))
    with pytest.raises(CompressError, match="no calibration token"):
        apply(layer, GptqConfig())
    with pytest.raises(CompressError, match="no calibration token"):
        apply(Layer(layer.info, layer.weight, None, InputStats(0, torch.full((64, 64), float("nan")))), GptqConfig())
    with pytest.raises(CompressError, match="NaN"):
        apply(Layer(layer.info, layer.weight, None, InputStats(5, torch.full((64, 64), float("nan")))), GptqConfig())


def test_group_that_does_not_divide_names_those_that_do() -> None:
    method = get("quantize", "gptq")
    message, hint = method.check(layer_of(gaussian(4, 48)).info, GptqConfig(group_size=64))  # type: ignore[attr-defined]
    assert "group_size 64 does not divide its 48" in message
    assert "8, 12, 16, 24, 48" in hint


@pytest.mark.parametrize("fields", [{"symmetric": False}, {"granularity": "channel"}, {"granularity": "tensor"}])
@pytest.mark.parametrize("limit", [1, 1 << 20])
def test_layers_with_the_same_inputs_give_the_same_jointly(
    fields: dict[str, Any], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums may differ in their last bit, which moves no code here."""
    monkeypatch.setattr(gptq, "STACKED", limit)
    inputs, original = correlated(256, 64), correlated(256, 64, seed=5)
    layers = [layer_of(gaussian(rows, 64, seed=rows), inputs, original) for rows in (16, 24, 1)]
    config = GptqConfig(bits=3, group_size=16, shift=0.5, **fields)
    for layer, found in zip(layers, batched(layers, config), strict=True):
        alone = apply(layer, config)
        assert isinstance(alone, IntGrouped)
        assert isinstance(found, IntGrouped)
        assert torch.equal(found.codes, alone.codes)
        torch.testing.assert_close(found.scale, alone.scale)
        assert (found.zero is None) == (alone.zero is None)


@pytest.mark.parametrize(("kind", "bits"), [("linear", 8), ("head", 8), ("embedding", None)])
@pytest.mark.parametrize("granularity", ["group", "channel", "tensor"])
def test_inputs_are_rounded_where_a_layer_has_inputs(kind: Any, bits: int | None, granularity: Any) -> None:
    layer = layer_of(gaussian(8, 64), correlated(128, 64))
    layer = replace(layer, info=replace(layer.info, kind=kind))
    config = GptqConfig(group_size=32, activation_bits=8, granularity=granularity)
    weight, outline = apply(layer, config), gptq.outline(layer.info, config)
    assert isinstance(weight, IntGrouped)
    assert weight.activation_bits == outline.activation_bits == bits
    assert weight.meta() == outline.meta()
    assert torch.equal(weight.codes, codes(layer, group_size=32, granularity=granularity).codes)
    assert gptq.describe(config, weight).get("activations") == bits


def test_inputs_of_codes_with_zero_points_are_not_rounded() -> None:
    with pytest.raises(ValueError, match="activation_bits needs symmetric"):
        GptqConfig(symmetric=False, activation_bits=8)


def test_normal_equations_of_scales() -> None:
    steps, inputs = gaussian(3, 4 * 5).view(3, 4, 5), correlated(64, 12)
    hessian = inputs.t() @ inputs
    expected = torch.einsum("gio,gihj,hjo->ogh", steps, hessian.view(3, 4, 3, 4), steps)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = torch.empty_like(hessian)
    shuffled[order[:, None], order] = hessian
    torch.testing.assert_close(_normal_matrices(shuffled, order, steps), expected, rtol=1e-4, atol=1e-3)
