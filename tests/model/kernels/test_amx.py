"""Both products of low-rank factors in one call give what two calls do, whatever the shapes and the threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from aicompress.model.kernels import amx, select
from aicompress.model.kernels.amx import TiledFactors
from aicompress.model.kernels.select import fast_linear
from aicompress.pipeline.layerwise.rows import malloc
from aicompress.weights import Dense, LowRank

# What the products give; where they are chosen, and what happens without them, is tested on every processor.
here = pytest.mark.skipif(
    amx.compiled() is None, reason="no AMX, or no numba: the packed products run, as tested below"
)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def factors(out: int, rank: int, columns: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(out + rank)
    right = torch.randn(rank, columns, generator=draw) / columns**0.5
    return right.bfloat16(), (torch.randn(out, rank, generator=draw) / rank**0.5).bfloat16()


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).bfloat16()


def wanted(x: Tensor, right: Tensor, left: Tensor, bias: Tensor | None) -> Tensor:
    inner = linear(x.float(), right.float()).bfloat16().float()
    return linear(inner, left.float(), None if bias is None else bias.float())


@here
@pytest.mark.parametrize(
    ("rows", "biased"),
    [(1, True), (31, False), (32, True), (33, False), (64, False), (100, True), (257, True), (257, False)],
)
@pytest.mark.parametrize(("out", "rank", "columns"), [(32, 1, 32), (96, 40, 64), (512, 300, 2048), (1024, 64, 96)])
def test_one_call_is_two_products(threads: int, rows: int, out: int, rank: int, columns: int, biased: bool) -> None:
    right, left = factors(out, rank, columns)
    bias = inputs(out) if biased else None
    given = TiledFactors(right, left, bias).multiply(inputs(rows, columns))
    reference = wanted(inputs(rows, columns), right, left, bias)
    assert given.shape == reference.shape
    assert given.dtype == torch.bfloat16
    torch.testing.assert_close(given.float(), reference, rtol=1e-2, atol=2e-2)


@here
def test_threads_that_share_an_arena_have_room_of_their_own() -> None:
    malloc.share_one_arena()  # as after a step in the same process: what one thread has freed, another one is given
    before = torch.get_num_threads()
    right, left = factors(1024, 64, 96)
    x, product = inputs(257, 96), TiledFactors(right, left, None)
    torch.set_num_threads(2)
    try:
        given = [product.multiply(x) for _ in range(20)]
    finally:
        torch.set_num_threads(before)
    for each in given:
        torch.testing.assert_close(each.float(), wanted(x, right, left, None), rtol=1e-2, atol=2e-2)


@here
def test_a_row_takes_nothing_from_another(threads: int) -> None:
    right, left = factors(64, 32, 64)
    x = inputs(70, 64)
    x[69] = torch.nan
    given = TiledFactors(right, left, None).multiply(x)
    assert given[69].isnan().all()
    torch.testing.assert_close(given[:69].float(), wanted(x[:69], right, left, None), rtol=1e-2, atol=2e-2)


@here
def test_other_code_finds_the_matrix_unit_as_it_left_it(threads: int) -> None:
    """oneDNN gives tiles other shapes; each of both sets its own."""
    right, left = factors(256, 64, 256)
    tiled, x, dense = TiledFactors(right, left, None), inputs(128, 256), inputs(256, 256)
    alone = linear(x, dense), tiled.multiply(x)
    for _ in range(3):
        assert torch.equal(linear(x, dense), alone[0])
        assert torch.equal(tiled.multiply(x), alone[1])


@here
@pytest.mark.parametrize("shape", [(3, 15, 1024), (15, 1024), (1, 40, 1024), (2, 32, 1024)])
def test_a_layer_takes_them_for_many_rows(shape: tuple[int, ...]) -> None:
    right, left = factors(992, 70, 1024)
    layer = fast_linear(LowRank(Dense(left), Dense(right)), inputs(992), torch.bfloat16, resident=False, keep=True)
    assert "tiles up to" in layer.kernel
    x = inputs(*shape, 2)[..., 0]  # not contiguous
    with torch.no_grad():
        given = layer(x)
    assert given.shape == (*shape[:-1], 992)
    torch.testing.assert_close(given.float(), wanted(x, right, left, inputs(992)), rtol=1e-2, atol=3e-2)


def test_few_rows_are_left_to_products_that_all_threads_share() -> None:
    tiled = TiledFactors(*factors(64, 32, 64), None)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert [tiled.serves(rows) for rows in (1, 32, 33, tiled.most, tiled.most + 1)] == [
            False,
            False,
            True,
            True,
            False,
        ]
    finally:
        torch.set_num_threads(before)


def test_shapes_that_no_tiles_fill() -> None:
    assert amx.fits(32, 100, 4096)
    small, uneven, wide = (64, 32, 64), [(1040, 128, 1024), (1024, 128, 1040)], (1024, 128, 8192)
    assert not any(amx.fits(*shape) for shape in (small, *uneven, wide, (0, 128, 1024)))


def test_without_the_unit_the_factors_are_two_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "tile_products", lambda: None)
    right, left = factors(992, 70, 1024)
    layer = fast_linear(LowRank(Dense(left), Dense(right)), inputs(992), torch.bfloat16, resident=False, keep=True)
    assert "tiles" not in layer.kernel
    with torch.no_grad():
        given = layer(inputs(40, 1024))
    torch.testing.assert_close(given.float(), wanted(inputs(40, 1024), right, left, inputs(992)), rtol=1e-2, atol=3e-2)
