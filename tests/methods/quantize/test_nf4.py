from __future__ import annotations

import torch

from aicompress.methods.quantize.nf4 import NF4, Nf4Config, apply
from aicompress.methods.quantize.rtn import RtnConfig
from aicompress.methods.quantize.rtn import apply as rtn
from aicompress.weights import Codebook, outline_nbytes
from tests.methods.quantize.layers import gaussian, layer_of


def test_by_hand() -> None:
    """Largest magnitude 2: its sign gives code 0 or 15, zero gives code 7, and 2 × 0.4407 = 0.8814 code 12."""
    found = apply(layer_of(torch.tensor([[2.0, 0.0, 0.88, -1.0]])), Nf4Config(granularity="channel"))
    assert isinstance(found, Codebook)
    assert found.codes.tolist() == [[15, 7, 12, 2]]
    assert found.scale is not None
    assert found.scale.tolist() == [[2.0]]


def test_the_table_has_equal_gaussian_masses_on_either_side() -> None:
    """Appendix E: 8 quantiles of the negative and 9 of the positive half, zero in both, scaled to ±1."""
    normal = torch.distributions.Normal(0.0, 1.0)
    offset = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2
    positive = normal.icdf(torch.linspace(offset, 0.5, 9))[:-1]
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8))[:-1]
    table = torch.cat([negative, torch.zeros(1), positive]).sort().values
    torch.testing.assert_close(table / table.abs().max(), torch.tensor(NF4), atol=2e-4, rtol=0)


def test_beats_the_uniform_grid_on_gaussian_weights_at_the_same_bytes() -> None:
    layer = layer_of(gaussian(64, 128))
    found, plain = apply(layer, Nf4Config(group_size=64)), rtn(layer, RtnConfig(bits=4, group_size=64))
    assert (found.dense() - layer.weight).square().sum() < (plain.dense() - layer.weight).square().sum()
    assert outline_nbytes(found) == outline_nbytes(plain) + 32  # the table
