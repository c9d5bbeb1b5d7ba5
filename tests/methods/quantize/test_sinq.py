from __future__ import annotations

import pytest
import torch

from aicompress.methods.quantize.rtn import RtnConfig
from aicompress.methods.quantize.rtn import apply as rtn
from aicompress.methods.quantize.sinq import SinqConfig, apply, column_factors
from aicompress.weights import ColumnScaled
from tests.methods.quantize.layers import gaussian, layer_of


def imbalance(matrix: torch.Tensor) -> float:
    spread = torch.cat([matrix.std(0), matrix.std(1)])
    return float(spread.max() / spread.min())


def factors_of(weight: torch.Tensor, iterations: int) -> torch.Tensor:
    return column_factors([lambda: weight], (weight.shape[0], weight.shape[1]), iterations)


def test_by_hand_one_wide_column() -> None:
    """Columns (1, -1) and (4, -4): factors in the ratio 1 to 4 make all four magnitudes equal."""
    factors = factors_of(torch.tensor([[1.0, 4.0], [-1.0, -4.0]]), 50)
    assert float(factors[1] / factors[0]) == pytest.approx(4, rel=1e-3)
    assert float(factors.log().mean()) == pytest.approx(0, abs=1e-6)


def test_rows_and_columns_become_even() -> None:
    weight = gaussian(48, 64) * torch.logspace(-1, 1, 64) * torch.logspace(-1, 1, 48)[:, None]
    columns = factors_of(weight, 50)
    normal = weight / columns
    normal = normal / normal.std(1, keepdim=True)
    assert imbalance(weight) > 50
    assert imbalance(normal) < 1.5


def test_constant_rows_and_columns_keep_factor_one() -> None:
    assert torch.equal(factors_of(torch.zeros(3, 4), 10), torch.ones(4))
    assert torch.equal(factors_of(torch.ones(1, 1), 10), torch.ones(1))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_beats_round_to_nearest_where_columns_differ(bits: int, symmetric: bool) -> None:
    """In error relative to each column, which is what outputs see when small weights meet large inputs."""
    size = torch.logspace(-1, 1, 64)
    layer = layer_of(gaussian(48, 64) * size)
    shared = {"bits": bits, "group_size": 32, "symmetric": symmetric}
    plain = rtn(layer, RtnConfig(**shared)).dense()  # type: ignore[arg-type]
    found = apply(layer, SinqConfig(**shared))  # type: ignore[arg-type]
    assert isinstance(found, ColumnScaled)
    assert ((found.dense() - layer.weight) / size).square().sum() < ((plain - layer.weight) / size).square().sum()
