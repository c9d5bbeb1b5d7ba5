"""spatial: a hand-computed case, the error identity, and what it wins over svd where kernels go along one axis each."""

from __future__ import annotations

import pytest
import torch

from aicompress.errors import RecipeError
from aicompress.methods.factorize import svd
from aicompress.methods.factorize.spatial import METHOD, SpatialConfig, apply, outline, resolve, turned
from aicompress.methods.factorize.svd import SvdConfig
from aicompress.weights import Convolutions, Dense, outline_nbytes
from tests.methods.layers import candidate_of, convolution, randn, squared_error


def test_hand_computed() -> None:
    """The sum of a Sobel kernel and a third of a blur, both products of a column and a row: rank 1 keeps the first."""
    sobel = torch.outer(torch.tensor([1.0, 2, 1]), torch.tensor([-1.0, 0, 1]))
    blur = torch.outer(torch.tensor([1.0, 0, -1]), torch.tensor([1.0, 1, 1])) / 3  # orthogonal along both axes
    kernel = torch.stack([sobel + blur, torch.zeros(3, 3)])[None]  # one output, two inputs of which one is unused
    found = apply(convolution(kernel.expand(8, 2, 3, 3)), SpatialConfig(rank=1))
    assert isinstance(found, Convolutions)
    assert found.kernels == ((3, 1), (1, 3))
    expected = torch.stack([sobel, torch.zeros(3, 3)]).expand(8, 2, 3, 3)
    torch.testing.assert_close(found.dense().reshape(8, 2, 3, 3), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(12, 6, 3, 3), (6, 12, 1, 5), (5, 4, 2, 3)], ids=str)
def test_squared_error_is_the_sum_of_dropped_squares(shape: tuple[int, ...]) -> None:
    layer = convolution(randn(*shape))
    squares = torch.linalg.svdvals(turned(lambda: layer).weight.double()).square()
    for rank in (1, 3):
        found = squared_error(layer, apply(layer, SpatialConfig(rank=rank)))
        assert found == pytest.approx(float(squares[rank:].sum()), rel=1e-5)


def test_separable_kernels_lose_less_than_with_svd_at_as_many_bytes() -> None:
    columns, rows = randn(6, 16, 5, 1), randn(24, 6, 1, 5, seed=1)
    layer = convolution(torch.einsum("rcya,orbx->ocyx", columns, rows) + 0.1 * randn(24, 16, 5, 5, seed=2))
    ours, plain = apply(layer, SpatialConfig(rank=8)), svd.apply(layer, SvdConfig(rank=4))
    assert outline_nbytes(ours) <= outline_nbytes(plain)
    assert squared_error(layer, ours) < 0.1 * squared_error(layer, plain)


def test_energy_and_bytes_count_the_two_convolutions() -> None:
    layer = convolution(randn(12, 6, 3, 3))
    (config,) = resolve([candidate_of(layer, SpatialConfig(energy=0.9))], 0)
    squares = torch.linalg.svdvals(turned(lambda: layer).weight.double()).square()
    share = squares.cumsum(0) / squares.sum()
    assert share[config.rank - 1] >= 0.9 > share[config.rank - 2]
    (config,) = resolve([candidate_of(layer, SpatialConfig(target_bytes=2000))], 500)
    assert outline_nbytes(outline(layer.info, config)) <= 1500 < outline_nbytes(outline(layer.info, config)) + 4 * 54
    with pytest.raises(RecipeError, match="out of reach"):
        resolve([candidate_of(layer, SpatialConfig(target_bytes=600))], 500)


@pytest.mark.parametrize("rank", [12, 1000])
def test_a_layer_that_would_grow_stays_as_it_is(rank: int) -> None:
    layer = convolution(randn(12, 6, 3, 3).half())
    found = apply(layer, SpatialConfig(rank=rank))
    assert isinstance(found, Dense)
    assert torch.equal(found.matrix, randn(12, 6, 3, 3).half().flatten(1))
    assert METHOD.describe(SpatialConfig(rank=rank), found)["note"]


@pytest.mark.parametrize("shape", [(8, 4, 1, 1), (8, 1, 3, 3), (8, 4, 3), (8, 4)], ids=str)
def test_what_is_no_convolution_along_two_axes_stays_as_it_is(shape: tuple[int, ...]) -> None:
    layer = convolution(randn(*shape))
    assert not METHOD.suits(layer.info)
    assert isinstance(apply(layer, SpatialConfig(rank=1)), Dense)


def test_zero_kernels_stay_zero() -> None:
    assert not apply(convolution(torch.zeros(12, 6, 3, 3)), SpatialConfig(rank=2)).dense().any()
