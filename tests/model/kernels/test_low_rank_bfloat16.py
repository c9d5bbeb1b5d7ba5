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
