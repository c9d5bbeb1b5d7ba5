"""rtn: hand-computed codes, error bounds, scales at the ends of their dtypes, presets."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from aicompress.errors import Refused
from aicompress.methods.quantize.grid.rounding import PIECE
from aicompress.methods.quantize.rtn import RtnConfig, apply, check, expand_preset
from aicompress.weights import IntGrouped
from tests.methods.layers import layer_of, randn


def quantized(weight: torch.Tensor, **fields: object) -> IntGrouped:
    found = apply(layer_of(weight), RtnConfig.model_validate(fields))
    assert isinstance(found, IntGrouped)
    return found


def test_hand_computed_symmetric() -> None:
    """absmax 7.5 over 15/2 levels: scale 1; 7.5 rounds to 8 and is clamped to 7, -7.5 rounds to -8."""
    found = quantized(torch.tensor([[7.5, -7.5, 0.4, -0.6]]), bits=4, granularity="channel", scale_dtype="float32")
    assert found.scale.tolist() == [[1.0]]
    assert found.codes.tolist() == [[7, -8, 0, -1]]


def test_hand_computed_asymmetric() -> None:
    """-1 ... 2 over 15 levels: scale 0.2; zero point -8 + 1/0.2 = -3."""
    found = quantized(
        torch.tensor([[-1.0, 2.0, 0.0, 0.2]]), bits=4, granularity="channel", symmetric=False, scale_dtype="float32"
    )
    assert found.scale.item() == pytest.approx(0.2)
    assert found.zero is not None
    assert found.zero.tolist() == [[-3]]
    assert found.codes.tolist() == [[-8, 7, -3, -2]]


def test_a_group_shares_a_scale() -> None:
    weight = torch.cat([torch.ones(2, 4), 100 * torch.ones(2, 4)], dim=1)
    found = quantized(weight, bits=8, group_size=4, scale_dtype="float32")
    assert found.scale.shape == (2, 2)
    assert torch.allclose(found.scale[:, 1], 100 * found.scale[:, 0])


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_error_is_at_most_half_a_step(bits: int, symmetric: bool, granularity: str) -> None:
    """A whole step at the upper end of a symmetric range, where -2^(b-1) has no positive partner."""
    weight = randn(24, 32)
    found = quantized(
        weight, bits=bits, symmetric=symmetric, granularity=granularity, group_size=16, scale_dtype="float32"
    )
    step = found.scale.repeat_interleave(32 // found.scale.shape[1], dim=1)
    assert ((found.dense() - weight).abs() <= step * 0.5001 + (0 if symmetric else step * 0.5)).all()


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_searched_range_is_never_worse(bits: int, symmetric: bool, granularity: str) -> None:
    weight = randn(24, 64) ** 3
    fields = {"bits": bits, "symmetric": symmetric, "granularity": granularity, "group_size": 32}
    plain, searched = (quantized(weight, range=kind, **fields).dense() for kind in ("minmax", "mse"))
    columns = 32 if granularity == "group" else 64
    errors = [(found - weight).square().reshape(-1, columns).sum(dim=1) for found in (plain, searched)]
    if granularity == "tensor":
        errors = [error.sum(dim=0, keepdim=True) for error in errors]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    if bits < 8:
        assert errors[1].sum() < errors[0].sum()


def test_pieces_of_rows_join() -> None:
    """A matrix larger than one piece gives what its rows give alone."""
    weight = randn(3, PIECE // 2)
    for granularity in ("channel", "group", "tensor"):
        whole = quantized(weight, bits=4, granularity=granularity)
        if granularity == "tensor":
            assert torch.equal(whole.scale, quantized(weight.reshape(1, -1), bits=4, granularity="tensor").scale)
            rounded = (weight[2] / whole.scale.float().squeeze()).round().clamp(-8, 7)
            assert torch.equal(whole.codes[2].float(), rounded)
        else:
            alone = quantized(weight[2:], bits=4, granularity=granularity)
            assert torch.equal(whole.codes[2:], alone.codes)
            assert torch.equal(whole.scale[2:], alone.scale)


@pytest.mark.parametrize("symmetric", [True, False])
def test_too_large_for_float16_scales(symmetric: bool) -> None:
    weight = 1e8 * randn(4, 16)
    with pytest.raises(Refused, match=r"layers\.0\.fc: its values are too large for float16") as refusal:
        quantized(weight, bits=4, granularity="channel", symmetric=symmetric)
    assert refusal.value.hint == "set scale_dtype: float32"
    found = quantized(weight, bits=4, granularity="channel", symmetric=symmetric, scale_dtype="float32")
    assert torch.isfinite(found.dense()).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_whole_range_of_float32(symmetric: bool) -> None:
    weight = torch.tensor([[3e38, -3e38, 1e38, 0.0], [1e-38, -1e-38, 2e-39, 0.0]])
    found = quantized(weight, bits=8, granularity="channel", symmetric=symmetric, scale_dtype="float32").dense()
    assert torch.isfinite(found).all()
    assert torch.allclose(found[0], weight[0], atol=3e36)


@pytest.mark.parametrize("symmetric", [True, False])
def test_tiny_values_keep_a_scale_and_zeros_a_normal_one(symmetric: bool) -> None:
    weight = torch.tensor([0.0, 1e-12, 1e-7])[:, None] * randn(3, 16)
    weight = quantized(weight, bits=4, granularity="channel", symmetric=symmetric)
    assert weight.scale[:, 0].tolist() == [torch.finfo(torch.float16).tiny, 2.0**-24, 2.0**-24]
    assert torch.isfinite(weight.dense()).all()


def test_small_scales_are_rounded_up_to_what_float16_holds() -> None:
    """3.2 steps of 2^-24 become 4: codes up to 7 · 3.2 / 4, none of them clipped."""
    step = 2.0**-24
    weight = quantized(3.2 * step * torch.tensor([[7.5, -7.5, 1.0, 0.0]]), bits=4, granularity="channel")
    assert weight.scale.item() == 4 * step
    assert weight.codes.tolist() == [[6, -6, 1, 0]]


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_zeros_stay_zero(symmetric: bool) -> None:
    weight = randn(4, 32)
    weight[1, :16] = 0
    found = quantized(weight, bits=3, group_size=16, symmetric=symmetric).dense()
    assert (found[1, :16] == 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_sided_groups_keep_zero_exact(symmetric: bool) -> None:
    weight = randn(4, 16).abs() + 1
    weight[:, 3] = 0
    found = quantized(weight, bits=4, granularity="channel", symmetric=symmetric).dense()
    assert (found[:, 3] == 0).all()


def test_quantizing_twice_changes_nothing_more() -> None:
    first = quantized(randn(8, 32), bits=8, granularity="channel", symmetric=False, scale_dtype="float32").dense()
    second = quantized(first, bits=8, granularity="channel", symmetric=False, scale_dtype="float32").dense()
    assert torch.allclose(first, second, atol=1e-6)


@pytest.mark.parametrize(
    ("preset", "fields"),
    [
        ("W8A16", {"bits": 8, "symmetric": True, "granularity": "channel"}),
        ("W8A8", {"bits": 8, "symmetric": True, "granularity": "channel", "activation_bits": 8}),
        ("W4A16", {"bits": 4, "symmetric": True, "granularity": "group"}),
        ("W3A16G64", {"bits": 3, "symmetric": True, "granularity": "group", "group_size": 64}),
        ("W2A16G32", {"bits": 2, "symmetric": True, "granularity": "group", "group_size": 32}),
        ("W8A16G64", {"bits": 8, "symmetric": True, "granularity": "group", "group_size": 64}),
    ],
)
def test_presets(preset: str, fields: dict[str, object]) -> None:
    assert expand_preset(preset) == fields
    config = RtnConfig(preset=preset)
    assert {name: getattr(config, name) for name in fields} == fields


def test_fields_beside_a_preset_win() -> None:
    config = RtnConfig(preset="W4A16", group_size=32, symmetric=False)
    assert (config.bits, config.group_size, config.symmetric) == (4, 32, False)


@pytest.mark.parametrize(
    "fields",
    [{"preset": "W5A16"}, {"preset": "W4A8"}, {"preset": "W8A8G64"}, {"preset": "W4"}, {"bits": 5}, {"group_size": 0},
     {"activation_bits": 8}, {"preset": "W8A8", "symmetric": False}],
)  # fmt: skip
def test_refused_parameters(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        RtnConfig.model_validate(fields)


@pytest.mark.parametrize(
    ("columns", "hint"),
    [
        (96, "sizes that fit: 8, 12, 16, 24, 32, 48, 96; or granularity: channel; or pad: true"),
        (13, "sizes that fit: 13; or granularity: channel; or pad: true"),
    ],
)
def test_a_group_size_that_does_not_divide(columns: int, hint: str) -> None:
    refusal = check(layer_of(randn(2, columns)).info, RtnConfig(bits=4, group_size=128))
    assert refusal is not None
    assert f"does not divide its {columns} input columns" in refusal[0]
    assert refusal[1] == hint
