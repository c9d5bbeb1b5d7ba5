"""Rotations: orthogonal for any width, Hadamard where a rule gives the order, the vector of ones kept when asked."""

from __future__ import annotations

import pytest
import torch

from aicompress.methods.quantize.grid import orthogonal
from aicompress.methods.quantize.grid.orthogonal import paley, rotation

HADAMARD = (1, 2, 4, 12, 20, 28, 36, 64, 96, 176, 256, 576, 768)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("width", [*HADAMARD, 7, 50, 100])
def test_orthogonal(width: int, centred: bool) -> None:
    turn = rotation(width, centred, torch.Generator().manual_seed(0))
    matrix = turn.right(torch.eye(width))
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(width), rtol=0, atol=2e-5)
    if centred:
        torch.testing.assert_close(turn.right(torch.ones(1, width)), torch.ones(1, width), rtol=0, atol=2e-5)
    elif width in HADAMARD:
        torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, width**-0.5))
    columns = torch.randn(width, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(turn.along(columns, 0), matrix.t() @ columns, rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", [4, 8, 12, 20, 24, 28, 36, 44, 60, 180])
def test_rows_of_paleys_matrices_are_orthogonal(order: int) -> None:
    found = paley(order)
    assert found is not None
    assert set(found.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(found @ found.t(), order * torch.eye(order))


@pytest.mark.parametrize("order", [2, 6, 7, 52, 92])
def test_orders_without_a_rule(order: int) -> None:
    """52 = 51 + 1 = 2 · (25 + 1): neither 51 nor 25 is a prime."""
    assert paley(order) is None


def test_a_large_table_is_turned_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    turn, rows = rotation(12, True, torch.Generator().manual_seed(0)), torch.randn(50, 12)
    whole = turn.right(rows)
    monkeypatch.setattr(orthogonal, "PIECE", 12 * 7)
    torch.testing.assert_close(turn.right(rows), whole)


def test_columns_are_turned_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no transpose of the whole is held beside it."""
    matrix = torch.randn(12, 300)
    whole, sizes, right = rotation(12, True, torch.Generator()).along(matrix, 0), [], orthogonal.OrthogonalMatrix.right
    monkeypatch.setattr(orthogonal, "PIECE", 12 * 7)
    monkeypatch.setattr(
        orthogonal.OrthogonalMatrix, "right", lambda own, rows: sizes.append(rows.numel()) or right(own, rows)
    )
    pieces = rotation(12, True, torch.Generator()).along(matrix, 0)
    assert max(sizes) == 12 * 7
    assert torch.allclose(pieces, whole)
    assert pieces.is_contiguous()


def test_the_seed_decides() -> None:
    one, same, other = (rotation(64, False, torch.Generator().manual_seed(seed)).signs for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
