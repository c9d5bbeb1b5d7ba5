"""Statistics over two samples, of rescaled inputs, and of nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from aicompress.statistics import InputStats


def test_statistics_of_nothing_add_nothing() -> None:
    """An expert that one of two files never saw."""
    seen = InputStats(3, torch.eye(2), columns={"norms": torch.ones(2), "mean_abs": torch.ones(2)})
    assert InputStats(0).merged(seen) is seen
    assert seen.merged(InputStats(0)) is seen
    assert InputStats(0).merged(InputStats(0)).count == 0


def test_statistics_of_rescaled_inputs_are_those_of_the_rescaled_rows() -> None:
    rows, factors = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, 1.0, 4.0])

    def stats(rows: Tensor) -> InputStats:
        gram, size = rows.t() @ rows / len(rows), rows.abs()
        columns = {"mean_abs": size.mean(0), "mean": rows.mean(0), "max_abs": size.amax(0)}
        return InputStats.of(len(rows), gram, columns, gram * 1.5)

    found, expected = stats(rows).divided(factors), stats(rows / factors)
    for name in ("gram", "norms", "mean_abs", "mean", "cross", "max_abs"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    assert InputStats(3).divided(factors) == InputStats(3)


def test_the_largest_input_of_two_samples_is_the_larger() -> None:
    one, two = (
        InputStats(n, columns={"max_abs": torch.tensor(seen)}) for n, seen in ((3, [1.0, 5.0]), (9, [2.0, 1.0]))
    )
    found = one.merged(two).max_abs
    assert found is not None
    assert found.tolist() == [2.0, 5.0]
