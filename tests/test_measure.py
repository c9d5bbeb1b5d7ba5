"""Numbers about tensors and time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aicompress import measure
from aicompress.measure import (
    WallTimes,
    directory_nbytes,
    interleaved,
    nbytes,
    paired_ratio,
    power_sums,
    rel_error,
    relative,
    squared_sums,
)
from aicompress.weights import Dense, IntGrouped


def test_nbytes() -> None:
    assert nbytes(torch.zeros(3, 5, dtype=torch.bfloat16)) == 30


@pytest.mark.parametrize(("rounds", "left"), [(1, 0), (5, 0), (6, 0), (9, 1), (15, 3), (30, 9)])  # binomial tables
def test_the_interval_of_a_paired_ratio_is_that_of_the_sign_test(rounds: int, left: int) -> None:
    before = WallTimes(tuple(2.0**turn for turn in range(rounds)))  # the machine slows down, for both
    after = WallTimes(tuple((1 + turn) * 2.0**turn for turn in range(rounds)))
    middle, low, high = paired_ratio(before, after)
    assert (low, middle, high) == (1 + left, (1 + rounds) / 2, rounds - left)


def test_rel_error_by_hand() -> None:
    assert rel_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])) == pytest.approx(0.8)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_rel_error_does_not_depend_on_the_scale(scale: float) -> None:
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    other = weight.half().float()
    expected = float((weight - other).double().norm() / weight.double().norm())
    assert rel_error(weight * scale, other * scale) == pytest.approx(expected, rel=1e-3)


def test_rel_error_of_zeros() -> None:
    zeros, ones = torch.zeros(2, 2), torch.ones(2, 2)
    assert rel_error(zeros, zeros) == 0
    assert rel_error(zeros, ones) is None
    assert rel_error(zeros, ones / 0) == float("inf")  # which no layer may become
    assert rel_error(torch.zeros(0, 4), torch.zeros(0, 4)) == 0


def test_rel_error_of_a_stored_weight_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(-8, 8, (7, 12), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    stored = IntGrouped(codes, torch.rand(7, 3), None, 4, 4)
    original = stored.dense() + 0.1
    whole = rel_error(original, stored.dense())
    monkeypatch.setattr(measure, "PIECE", 24)  # two rows at a time, and one that is left
    assert rel_error(original, stored) == pytest.approx(whole, rel=1e-6)


def test_squared_sums_of_blocks_add_up() -> None:
    matrix, other = torch.randn(10, 6), torch.randn(10, 6)
    parts = [squared_sums(matrix[rows], other[rows]) for rows in (slice(0, 4), slice(4, 10))]
    assert relative(*map(sum, zip(*parts, strict=True))) == pytest.approx(rel_error(matrix, other), rel=1e-6)


def test_a_dense_weight_is_not_changed_by_measuring_it() -> None:
    matrix = torch.randn(3, 4)
    assert rel_error(torch.zeros(3, 4) + matrix, Dense(matrix)) == 0
    assert rel_error(torch.ones(3, 4), Dense(matrix)) == rel_error(torch.ones(3, 4), matrix) > 0


def test_timing() -> None:
    timing = WallTimes(tuple(float(n) for n in range(1, 101)))
    assert timing.median == 50.5
    assert timing.p95 == 96


def test_interleaved_takes_turns_and_leaves_out_the_warmup() -> None:
    calls: list[str] = []
    first, second = interleaved([lambda: calls.append("a"), lambda: calls.append("b")], rounds=3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert len(first.samples) == len(second.samples) == 3
    assert min(first.samples) >= 0


def test_directory_nbytes(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "one").write_bytes(b"12345")
    (tmp_path / "sub" / "two").write_bytes(b"123")
    assert directory_nbytes(tmp_path) == 8
    assert directory_nbytes(tmp_path / "one") == 5


def test_peak_rss_grows_with_memory() -> None:
    before = measure.peak_rss()
    block = bytearray(before // 2 + (64 << 20))
    block[::4096] = b"x" * len(block[::4096])
    assert measure.peak_rss() >= before
    assert 1 << 20 < before < 1 << 40


class Float64(TorchDispatchMode):
    """Notes how large float64 tensors get."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        if isinstance(given, torch.Tensor) and given.dtype is torch.float64:
            self.largest = max(self.largest, given.numel())
        return given


@pytest.mark.parametrize("shape", [(40, 50), (1, 2000), (3, 700), (0, 5), (5, 0)])
@pytest.mark.parametrize("order", [1, 2])
def test_sums_of_powers_are_those_of_float64_without_a_copy(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], order: int
) -> None:
    monkeypatch.setattr(measure, "PIECE", 100)
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with Float64() as noted:
        sums = power_sums(rows, order)
    torch.testing.assert_close(sums, rows.double().abs().pow(order).sum(dim=1))
    assert noted.largest <= 100
