"""Factors in bfloat16 are packed, and give what two products of plain ones do."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from aicompress.model.kernels.select import fast_linear
from aicompress.weights import Dense, LowRank


@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 5)])
@pytest.mark.parametrize("biased", [True, False])
def test_packed_factors_are_two_products(shape: tuple[int, ...], biased: bool) -> None:
    out, inner, x = (torch.randn(size).bfloat16() for size in ((48, 3), (3, 40), (*shape, 40)))
    bias = torch.randn(48).bfloat16() if biased else None
    layer = fast_linear(LowRank(Dense(out), Dense(inner)), bias, torch.bfloat16, resident=False)
    assert layer.kernel == "low rank: bfloat16, bfloat16"
    with torch.no_grad():
        given = layer(x)
    assert given.dtype == torch.bfloat16
    torch.testing.assert_close(given, linear(linear(x, inner), out, bias), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("biased", [True, False])
def test_small_factors_multiply_few_inputs_in_float32(biased: bool) -> None:
    """Without the rounding between the products; more inputs go the packed way."""
    out, inner, x = (torch.randn(size).bfloat16() for size in ((720, 30), (30, 800), (100, 800)))
    bias = torch.randn(720).bfloat16() if biased else None
    layer = fast_linear(LowRank(Dense(out), Dense(inner)), bias, torch.bfloat16, resident=False, keep=True)
    assert layer.kernel.startswith("low rank: bfloat16, bfloat16, float32 up to 8 rows")
    wanted = linear(linear(x.float(), inner.float()), out.float(), None if bias is None else bias.float())
    with torch.no_grad():
        few, many = layer(x[:8]), layer(x)
    torch.testing.assert_close(few, wanted[:8].bfloat16(), rtol=1e-2, atol=1e-2)
    errors = [float((each.float() - wanted[:8]).norm()) for each in (few, many[:8])]
    assert errors[0] < 0.9 * errors[1]
    torch.testing.assert_close(many, wanted.bfloat16(), rtol=2e-2, atol=2.0)
    large = LowRank(Dense(torch.randn(1024, 200).bfloat16()), Dense(torch.randn(200, 1024).bfloat16()))
    assert "float32" not in fast_linear(large, None, torch.bfloat16, resident=False, keep=True).kernel
