"""Sums over rows that weigh differently."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from aicompress.model.blocks.input_statistics import InputSums
from aicompress.statistics import column


def test_two_kinds_of_rows_of_equal_weight_give_the_mean_of_both_statistics() -> None:
    generator = torch.Generator().manual_seed(0)
    many, few = torch.randn(60, 6, generator=generator), torch.randn(4, 6, generator=generator) + 1
    needs = frozenset({"gram", "mean_abs", "mean", "max_abs"})
    one, other, both = (InputSums(needs) for _ in range(3))
    one.add(many, many)
    other.add(few, few)
    both.add(many, many, 64 / 120)
    both.add(few, few, 64 / 8)
    first, second, mixed = (sums.mean() for sums in (one, other, both))
    assert mixed.count == 64
    for name in ("gram", "norms", "mean_abs", "cross", "mean", "original_mean"):
        left, right, mean = (getattr(stats, name) for stats in (first, second, mixed))
        torch.testing.assert_close(mean, (left + right) / 2)
    assert mixed.max_abs is not None
    assert torch.equal(mixed.max_abs, torch.cat([many, few]).abs().amax(0))


class Largest(TorchFunctionMode):
    """Notes how many numbers the largest tensor has that is made of others."""

    numbers = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = function(*args, **(kwargs or {}))
        if isinstance(given, Tensor) and function in (torch.square, torch.abs, Tensor.square, Tensor.abs):
            self.numbers = max(self.numbers, given.numel())
        return given


def test_norms_of_many_rows_take_little_memory_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(column, "MOST", 60)
    rows, sums = (
        torch.randn(100, 6, generator=torch.Generator().manual_seed(0)),
        InputSums(frozenset({"norms", "mean_abs"})),
    )
    with Largest() as largest:
        sums.add(rows, None, 0.5)
    stats = sums.mean()
    assert largest.numbers == 60
    torch.testing.assert_close(stats.norms, rows.square().mean(0))
    torch.testing.assert_close(stats.mean_abs, rows.abs().mean(0))
