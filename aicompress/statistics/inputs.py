"""Second-order statistics of a layer's inputs, and those of their columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from aicompress.statistics.column import column_statistics


@dataclass(frozen=True)
class InputStats:
    """Statistics of a layer's inputs over calibration tokens.

    Attributes:
        count: number of input rows seen.
        gram: mean of x xᵀ, (in, in), or None.
        columns: statistics of single columns, (in,) each, by name; those of `statistics/columns/` that were asked for.
        cross: mean of x x̂ᵀ, (in, in), x the original model's input where x̂ is the compressed model's; or None.
        original_mean: mean of the original model's x, (in,), beside `cross`; or None.
        frequency: of an embedding, the share of lookups that each row has, (out,), or None.
        experts: of a parameter that holds several experts, the statistics of each one's inputs, and none of the above.
    """

    count: int
    gram: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)
    cross: Tensor | None = field(default=None, kw_only=True)
    original_mean: Tensor | None = field(default=None, kw_only=True)
    frequency: Tensor | None = field(default=None, kw_only=True)
    experts: tuple[InputStats, ...] = field(default=(), kw_only=True)

    @property
    def norms(self) -> Tensor | None:
        """Mean of x², (in,), or None."""
        return self.columns.get("norms")

    @property
    def mean_abs(self) -> Tensor | None:
        """Mean of |x|, (in,), or None."""
        return self.columns.get("mean_abs")

    @property
    def mean(self) -> Tensor | None:
        """Mean of x, (in,), or None."""
        return self.columns.get("mean")

    @property
    def max_abs(self) -> Tensor | None:
        """Largest |x|, (in,), or None."""
        return self.columns.get("max_abs")

    @classmethod
    def of(
        cls, count: int, gram: Tensor | None, sums: Mapping[str, Tensor], cross: Tensor | None = None, **others: Any
    ) -> InputStats:
        """Statistics with what the Gram matrix holds of single columns beside those that were summed apart."""
        known = () if gram is None else column_statistics().values()
        held = {each.name: each.of_gram(gram) for each in known if each.of_gram is not None and gram is not None}
        return cls(count, gram, columns={**sums, **held}, cross=cross, **others)

    @classmethod
    def of_experts(cls, experts: Sequence[InputStats]) -> InputStats:
        """Statistics of the inputs of several experts."""
        return cls(sum(own.count for own in experts), experts=tuple(experts))

    @classmethod
    def white(cls, width: int) -> InputStats:
        """Statistics of inputs of which nothing is known: independent, all of one size."""
        identity = torch.eye(width)
        own = {name: statistic.white(width) for name, statistic in column_statistics().items()}
        return cls(1, identity, columns=own, cross=identity, original_mean=torch.zeros(width))

    def of_lookups(self, width: int) -> InputStats:
        """Of an embedding: white inputs of its matrix, of whose rows some are looked up more often than others."""
        return replace(InputStats.white(width), count=self.count, frequency=self.frequency)

    def divided(self, factors: Tensor) -> InputStats:
        """Statistics of the same inputs with each channel divided by a factor.

        Args:
            factors: (in,), above zero.
        """
        if self.experts:
            return InputStats.of_experts([own.divided(factors) for own in self.experts])
        by, known = factors.reciprocal(), column_statistics()

        def twice(values: Tensor | None) -> Tensor | None:
            return None if values is None else values * by * by[:, None]

        return InputStats(
            self.count,
            twice(self.gram),
            columns={name: known[name].divided(values, by) for name, values in self.columns.items()},
            cross=twice(self.cross),
            original_mean=None if self.original_mean is None else self.original_mean * by,
        )

    def in_order(self, order: Tensor) -> InputStats:
        """Statistics of the same inputs with their columns in another order, (in,)."""

        def twice(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[order][:, order]

        return replace(
            self,
            gram=twice(self.gram),
            columns={name: values[order] for name, values in self.columns.items()},
            cross=twice(self.cross),
            original_mean=None if self.original_mean is None else self.original_mean[order],
        )

    def through(self, matrix: Tensor) -> InputStats:
        """Statistics of y = M x for these x: what the outer factor of a low-rank layer is given.

        Args:
            matrix: M, (rank, in).

        Raises:
            ValueError: there is no Gram matrix to carry through.
        """
        if not self.count:
            return self
        if self.gram is None:
            raise ValueError("only second-order statistics go through a matrix")
        cross = None if self.cross is None else matrix @ self.cross @ matrix.t()
        original = None if self.original_mean is None else matrix @ self.original_mean
        linear = {name: matrix @ values for name, values in self.columns.items() if column_statistics()[name].linear}
        return InputStats.of(self.count, matrix @ self.gram @ matrix.t(), linear, cross, original_mean=original)

    def merged(self, other: InputStats) -> InputStats:
        """Statistics over both samples: means weighted by their counts.

        Raises:
            ValueError: one has a statistic that the other lacks.
        """
        if self.experts and other.experts:
            pairs = zip(self.experts, other.experts, strict=True)
            return InputStats.of_experts([mine.merged(theirs) for mine, theirs in pairs])
        if not self.count or not other.count:
            return self if self.count else other
        total = self.count + other.count

        def mean(name: str, mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            if (mine is None) != (theirs is None):
                raise ValueError(f"only one of the statistics has {name}")
            return None if mine is None or theirs is None else (mine * self.count + theirs * other.count) / total

        own: dict[str, Tensor] = {}
        for name in {**self.columns, **other.columns}:
            mine, theirs = self.columns.get(name), other.columns.get(name)
            both = mean(name, mine, theirs)
            if mine is not None and theirs is not None and both is not None:
                own[name] = torch.maximum(mine, theirs) if column_statistics()[name].largest else both
        return InputStats(
            total,
            mean("gram", self.gram, other.gram),
            columns=own,
            cross=mean("cross", self.cross, other.cross),
            original_mean=mean("original_mean", self.original_mean, other.original_mean),
            frequency=mean("frequency", self.frequency, other.frequency),
        )
