from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aicompress.methods.quantize.grid.rounding import decode, encode, grouped
from aicompress.methods.quantize.grid.scales import full_range, least_error
from aicompress.methods.quantize.imatrix import ImatrixConfig
from tests.methods.quantize.layers import gaussian

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def hard() -> Tensor:
    """Rows of (12, 48): zeros, a single weight, one with an outlier, one of tiny numbers; the rest is normal."""
    weight = gaussian(12, 48)
    weight[:2] = 0
    weight[1, 5] = 0.25
    weight[2, 7] = 40.0
    weight[3] *= 1e-30
    return weight


def errors(weight: Tensor, h: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Σ h (w − ŵ)² of every group, in float64."""
    groups = grouped(weight, 16)
    found = decode(encode(groups, scale, None, bits), scale, None)
    return ((found.double() - groups).square() * grouped(h[None], 16)).sum(-1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_group_is_worse_than_with_its_full_range(bits: int, dtype: str) -> None:
    weight, h = hard(), torch.rand(48, generator=torch.Generator().manual_seed(1)) + 0.01
    config = ImatrixConfig(bits=bits, group_size=16)
    scale, _ = least_error(weight, h, config, DTYPES[dtype])
    full, _ = full_range(weight, config, DTYPES[dtype])
    assert scale.dtype == DTYPES[dtype]
    assert (scale != 0).all()
    found, before = errors(weight, h, scale, bits), errors(weight, h, full, bits)
    # a fitted scale is rounded to its dtype: a step of bfloat16 moves the codes of 8 bits by half of one
    assert (found <= before * (1.01 if dtype == "float32" else 1.1) + 1e-9).all()
    assert found.sum() < (0.95 if bits < 8 else 1.01) * before.sum()


def test_only_the_proportions_of_the_importance_count() -> None:
    weight, h = hard(), torch.rand(48, generator=torch.Generator().manual_seed(1)) + 0.01
    config = ImatrixConfig(bits=3, group_size=16)
    expected, _ = least_error(weight, h, config, torch.float32)
    for factor in (2.0**-40, 2.0**40):
        assert torch.equal(least_error(weight, h * factor, config, torch.float32)[0], expected)
    for alike in (torch.zeros(48), torch.full((48,), 0.5)):
        found, _ = least_error(weight, alike, config, torch.float32)
        assert torch.equal(found, least_error(weight, None, config, torch.float32)[0])
