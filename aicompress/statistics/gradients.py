"""Moments of the gradients of a loss in a layer's weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
