"""streamed: a matrix that is read in blocks of rows has the factors of one that is held."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from aicompress.methods.factorize import decomposition, streamed
from tests.methods.layers import randn


def in_blocks(weight: Tensor, size: int, read: list[int] | None = None) -> streamed.Rows:
    """A matrix in blocks of so many rows; `read` notes which are read."""
    notes = [] if read is None else read

    def block(start: int) -> Tensor:
        notes.append(start // size)
        return weight[start : start + size]

    return streamed.Rows((len(weight), weight.shape[1]), [partial(block, n) for n in range(0, len(weight), size)])


def product(weight: Tensor, found: streamed.Factors) -> Tensor:
    out = torch.cat(found.out) if found.right is None else weight @ found.right
    return out @ found.inner


@pytest.mark.parametrize("shape", [(90, 40), (40, 90), (60, 60)], ids=str)
def test_factors_and_singular_values_are_those_of_the_whole(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = randn(*shape)
    monkeypatch.setattr(streamed, "PANEL", 2 * 16 * shape[1])  # two blocks
    out, inner = decomposition.factors(weight, 7)
    torch.testing.assert_close(product(weight, streamed.factors(in_blocks(weight, 16), 7)), out @ inner)
    squares = streamed.squared_singular_values(in_blocks(weight, 16))
    torch.testing.assert_close(squares, torch.linalg.svdvals(weight.double()).square())


def test_directions_of_nothing_have_zero_factors() -> None:
    weight = randn(90, 3) @ randn(3, 40)
    for matrix in (weight, weight.t().contiguous()):
        found = streamed.factors(in_blocks(matrix, 16), 6)
        torch.testing.assert_close(product(matrix, found), matrix, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.inner.abs().amax(dim=1) > 0.01, torch.tensor([True] * 3 + [False] * 3))


@pytest.mark.parametrize(("shape", "reads"), [((400, 160), 6), ((160, 400), 10)], ids=["tall", "wide"])
def test_few_directions_come_as_close_as_of_the_whole(
    shape: tuple[int, int], reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decomposition, "LARGE", 128)
    weight, read = randn(*shape) @ torch.diag(0.99 ** torch.arange(shape[1])), list[int]()
    out, inner = decomposition.factors(weight, 10)
    found = streamed.factors(in_blocks(weight, 50, read), 10)
    assert len(read) == reads * -(-shape[0] // 50)
    least = float(torch.linalg.svdvals(weight.double())[10:].square().sum())
    ours, theirs = (float((weight - close).square().sum()) / least for close in (product(weight, found), out @ inner))
    assert 1 - 1e-5 < ours < 1.001 * theirs
    assert theirs < 1.01


def test_a_wide_matrix_is_read_by_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three panels of two blocks: each passes by those before it."""
    monkeypatch.setattr(streamed, "PANEL", 2 * 10 * 100)
    read = list[int]()
    streamed.gram(in_blocks(randn(60, 100), 10, read))
    assert read == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 4, 5]
