"""What is known of a layer beside its weight: statistics of its inputs, and of the gradients of a loss in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class InputStats:
    """Second-order statistics of a layer's inputs over calibration tokens.

    Attributes:
        count: number of input rows seen.
        gram: mean of x xᵀ, (in, in), or None.
        norms: mean of x², (in,), or None.
        mean_abs: mean of |x|, (in,), or None.
        cross: mean of x x̂ᵀ, (in, in), x the original model's input where x̂ is the compressed model's; or None.
        mean: mean of x, (in,), or None.
        original_mean: mean of the original model's x, (in,), beside `cross`; or None.
        max_abs: largest |x|, (in,), or None.
        frequency: of an embedding, the share of lookups that each row has, (out,), or None.
        experts: of a parameter that holds several experts, the statistics of each one's inputs, and none of the above.
    """

    count: int
    gram: Tensor | None = None
    norms: Tensor | None = None
    mean_abs: Tensor | None = None
    cross: Tensor | None = None
    mean: Tensor | None = None
    original_mean: Tensor | None = None
    max_abs: Tensor | None = None
    frequency: Tensor | None = None
    experts: tuple[InputStats, ...] = field(default=(), kw_only=True)

    @classmethod
    def of_experts(cls, experts: Sequence[InputStats]) -> InputStats:
        """Statistics of the inputs of several experts."""
        return cls(sum(own.count for own in experts), experts=tuple(experts))

    @classmethod
    def white(cls, width: int) -> InputStats:
        """Statistics of inputs of which nothing is known: independent, all of one size."""
        identity, ones = torch.eye(width), torch.ones(width)
        zeros = torch.zeros(width)
        return cls(1, identity, ones, ones, identity, zeros, zeros, ones)

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
        by = factors.reciprocal()

        def once(values: Tensor | None) -> Tensor | None:
            return None if values is None else values * by

        def twice(values: Tensor | None) -> Tensor | None:
            return None if values is None else values * by * by[:, None]

        norms = None if self.norms is None else self.norms * by.square()
        means = (once(self.mean_abs), twice(self.cross), once(self.mean), once(self.original_mean))
        return InputStats(self.count, twice(self.gram), norms, *means, once(self.max_abs))

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
        gram = matrix @ self.gram @ matrix.t()
        cross = None if self.cross is None else matrix @ self.cross @ matrix.t()
        means = [None if mean is None else matrix @ mean for mean in (self.mean, self.original_mean)]
        return InputStats(self.count, gram, gram.diagonal().clone(), None, cross, *means)

    def merged(self, other: InputStats) -> InputStats:
        """Statistics over both samples: means weighted by their counts.

        Raises:
            ValueError: one has a statistic that the other lacks.
        """
        if self.experts and other.experts:
            pairs = zip(self.experts, other.experts, strict=True)
            return InputStats.of_experts([mine.merged(theirs) for mine, theirs in pairs])
        total = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        fields: dict[str, Any] = {}
        for name in ("gram", "norms", "mean_abs", "cross", "mean", "original_mean", "max_abs", "frequency"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if (mine is None) != (theirs is None):
                raise ValueError(f"only one of the statistics has {name}")
            if mine is None or name == "max_abs":
                fields[name] = None if mine is None else torch.maximum(mine, theirs)
            else:
                fields[name] = (mine * self.count + theirs * other.count) / total
        return InputStats(total, **fields)


@dataclass(frozen=True)
class GradientStats:
    """Moments of the gradients g of single samples' losses with respect to a layer's weight matrix.

    Attributes:
        count: number of samples.
        mean: mean of g, (out, in) float32: the gradient of the mean loss; None, as `square`, where only the output's
            gradients were asked for.
        square: mean of g², (out, in) float32: with labels drawn from the model's own predictions the diagonal of its
            Fisher information, and with true labels the empirical one.
        output_gram: mean over samples of Σ d dᵀ over the rows of the layer's output, d the gradient of the loss in such
            a row, (out, out) float32; or None.
    """

    count: int
    mean: Tensor | None = None
    square: Tensor | None = None
    output_gram: Tensor | None = None

    @classmethod
    def flat(cls, shape: tuple[int, int]) -> GradientStats:
        """Moments of gradients of which nothing is known: every weight matters alike."""
        return cls(1, torch.ones(shape), torch.ones(shape))

    def of_expert(self, split: Callable[[Tensor], Sequence[Tensor]], number: int) -> GradientStats:
        """Those of one expert; where no gradient reached it, all of its weights matter alike.

        Args:
            split: gives the matrices of all experts out of the parameter's.
            number: of the expert.
        """
        means = [None if each is None else split(each)[number] for each in (self.mean, self.square)]
        own = GradientStats(self.count, *means)
        shape = next(each.shape for each in means if each is not None)
        return own if own.reached else GradientStats.flat((shape[0], shape[1]))

    @property
    def reached(self) -> bool:
        """Whether a gradient of the loss came at all."""
        seen = self.output_gram if self.square is None else self.square
        return seen is not None and bool(seen.any())

    def merged(self, other: GradientStats) -> GradientStats:
        """Moments over both samples: means weighted by their counts."""
        total = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other

        def mean(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            if mine is None or theirs is None:
                return None
            return (mine * self.count + theirs * other.count) / total

        means = mean(self.mean, other.mean), mean(self.square, other.square)
        return GradientStats(total, *means, mean(self.output_gram, other.output_gram))
