"""Parts of a layer are multiplied out where a call for each takes longer than what they save."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from aicompress.model.kernels import select
from aicompress.model.kernels.linear import FastLinear
from aicompress.model.kernels.select import fast_linear
from aicompress.weights import BaseDelta, Dense, Weight
from tests.model.compressed import low_rank

OUT, COLUMNS, ROWS = 48, 64, 70


@torch.inference_mode()
def error(layer: FastLinear, weight: Weight, bias: Tensor) -> float:
    """Of a layer's outputs against those of the stored weight."""
    x = torch.randn(ROWS, COLUMNS).to(bias.dtype)
    expected = linear(x.float(), weight.dense(), bias.float())
    return float((layer(x).float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_that_save_little_are_one_product(
    dtype: torch.dtype, native: bool, bits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For as many inputs as that takes less; those that save nothing are so for all."""
    monkeypatch.setattr(select, "has_fast_bfloat16", lambda: native)
    bias, matrix = torch.randn(OUT).to(dtype), torch.randn(OUT, COLUMNS)
    for rank in (26, 8):
        weight = low_rank(matrix, rank, bits)
        layer = fast_linear(weight, bias, dtype, resident=True, keep=True)
        assert ("multiplied out: " if rank == 26 else "one product up to ") in layer.kernel
        assert error(layer, weight, bias) < 2e-2


@pytest.mark.parametrize("weight", [low_rank(torch.randn(OUT, COLUMNS), rank) for rank in (26, 8)])
def test_what_layers_share_is_held_once_unless_it_is_small(weight: Weight, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "has_fast_bfloat16", lambda: True)
    small, large = (fast_linear(weight, None, torch.bfloat16, fits, keep=True, shared=True) for fits in (True, False))
    assert "one product" in small.kernel or "multiplied out" in small.kernel
    assert large.kernel.startswith("low rank: ")
    assert "one product" not in large.kernel
    assert "multiplied out" not in fast_linear(weight, None, torch.bfloat16, resident=False, keep=False).kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_and_a_difference_are_one_matrix_where_the_model_fits_into_the_cache(dtype: torch.dtype) -> None:
    weight = BaseDelta(Dense(torch.randn(OUT, 4)), Dense(torch.randn(4, COLUMNS)), Dense(torch.randn(OUT, COLUMNS)))
    for resident in (True, False):
        layer = fast_linear(weight, torch.zeros(OUT, dtype=dtype), dtype, resident, keep=True)
        assert layer.kernel.startswith("base delta, multiplied out: " if resident else "base: ")
        assert error(layer, weight, torch.zeros(OUT, dtype=dtype)) < 2e-2
