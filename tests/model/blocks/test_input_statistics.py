"""Sums over rows that weigh differently."""

from __future__ import annotations

import torch

from aicompress.model.blocks.input_statistics import Sums


def test_two_kinds_of_rows_of_equal_weight_give_the_mean_of_both_statistics() -> None:
    generator = torch.Generator().manual_seed(0)
    many, few = torch.randn(60, 6, generator=generator), torch.randn(4, 6, generator=generator) + 1
    needs = frozenset({"gram", "mean_abs", "mean", "max_abs"})
    one, other, both = (Sums(needs) for _ in range(3))
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
