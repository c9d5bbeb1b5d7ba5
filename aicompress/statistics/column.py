"""What can be known of a column of a layer's inputs beside the Gram matrix: a mean, or the largest, of f(x)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from aicompress.discovery import members

MOST = 1 << 23  # numbers that f is computed of at a time


@dataclass(frozen=True)
class ColumnStatistic:
    """One number for each column: the mean of f(x) over the rows, or the largest f(x).

    Attributes:
        name: what a method's `needs`, files of statistics and `InputStats.columns` have it by.
        of: f, element by element: (rows, in) -> (rows, in); None: x itself.
        degree: k of f(x / s) = f(x) / s^k for every s above zero.
        largest: the largest f(x), not its mean.
        of_gram: the same out of a Gram matrix (in, in), beside which it is neither summed nor stored; None: a Gram
            matrix does not hold it.
    """

    name: str
    of: Callable[[Tensor], Tensor] | None
    degree: int
    largest: bool = False
    of_gram: Callable[[Tensor], Tensor] | None = None

    @property
    def linear(self) -> bool:
        """Whether that of M x is M times that of x, for any matrix M."""
        return self.of is None and not self.largest

    def added(self, known: Tensor | None, rows: Tensor, weight: float = 1.0) -> Tensor:
        """Go on with the sum, or the largest, over more rows: some at a time, so that few changed numbers are held.

        Args:
            known: over the rows before, (in,), which is changed in place; None before the first.
            rows: (rows, in) float32, at least one.
            weight: how often each of them counts in a mean.
        """
        some = max(1, MOST // rows.shape[1]) if self.of is not None else len(rows)
        for part in torch.split(rows, some):
            changed = part if self.of is None else self.of(part)
            own = changed.amax(dim=0) if self.largest else changed.sum(dim=0).mul_(weight)
            known = own if known is None else torch.maximum(known, own) if self.largest else known.add_(own)
        assert known is not None
        return known

    def divided(self, values: Tensor, by: Tensor) -> Tensor:
        """The statistic of inputs that are divided by a factor for each column.

        Args:
            values: of the inputs as they are, (in,).
            by: 1 / factor, (in,), above zero.
        """
        return values * by.pow(self.degree)

    def white(self, width: int) -> Tensor:
        """The statistic of inputs that are 1 and -1 equally often, (in,)."""
        ends = torch.tensor([[-1.0], [1.0]]).expand(2, width)
        changed = ends if self.of is None else self.of(ends)
        return changed.amax(dim=0) if self.largest else changed.mean(dim=0)


def column_statistics() -> Mapping[str, ColumnStatistic]:
    """All statistics of columns by name, in the order in which files of statistics hold them."""
    found = members("aicompress.statistics.columns", "STATISTIC")
    return {name: found[name] for name in sorted(found, reverse=True)}
