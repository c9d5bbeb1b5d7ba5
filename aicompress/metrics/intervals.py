"""Estimate shares and means with their uncertainty: a value, its 95% interval, and the number of samples behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aicompress.metrics.metric import Change, Estimate, PairedSamples

Z = 1.959963984540054  # 97.5% quantile of the normal distribution
RESAMPLES = 2000
DRAWN = 1 << 20  # numbers at a time


def proportion(hits: int, n: int, unit: str) -> Estimate:
    """Estimate a share with its exact binomial interval (Clopper and Pearson, Biometrika 26, 1934)."""
    return Estimate(hits / n, *clopper_pearson(hits, n), n, unit, "exact binomial")


def share(right: Tensor, unit: str) -> Estimate:
    """Estimate the share of samples that are right.

    Args:
        right: (samples,) bool.
        unit: what a sample is.
    """
    return replace(proportion(int(right.sum()), len(right), unit), samples=Answers(right))


@dataclass(frozen=True, eq=False)
class Answers(PairedSamples):
    """Which samples were right, (samples,) bool: two shares differ by those that only one of them has right.

    The interval is the adjusted one of Agresti and Min (Statistics in Medicine 24, 2005), which does not shrink to
    nothing where the answers are the same.
    """

    right: Tensor

    def change(self, baseline: Answers) -> Change:
        n = len(self.right)
        gained = int((self.right & ~baseline.right).sum())
        lost = int((baseline.right & ~self.right).sum())
        middle = (gained - lost) / (n + 2)
        error = math.sqrt((gained + lost + 1) - (gained - lost) ** 2 / (n + 2)) / (n + 2)
        low, high = max(-1.0, middle - Z * error), min(1.0, middle + Z * error)
        return Change((gained - lost) / n, low, high, "difference", "Agresti-Min, paired")


def clopper_pearson(hits: int, n: int) -> tuple[float, float]:
    """Compute the 95% limits of a binomial share: each tail holds at most 2.5%."""
    low = 0.0 if hits == 0 else _bisect(lambda p: 0.025 - _tail(hits, n, n, p))
    high = 1.0 if hits == n else _bisect(lambda p: _tail(0, hits, n, p) - 0.025)
    return low, high


def _tail(first: int, last: int, n: int, p: float) -> float:
    """P(first <= X <= last) for X binomial (n, p)."""
    k = torch.arange(first, last + 1, dtype=torch.float64)
    size = torch.tensor(float(n), dtype=torch.float64)
    choose = torch.lgamma(size + 1) - torch.lgamma(k + 1) - torch.lgamma(size - k + 1)
    return float((choose + k * math.log(p) + (n - k) * math.log1p(-p)).exp().sum())


def _bisect(falling: Callable[[float], float]) -> float:
    """Where a falling function of a share in (0, 1) crosses zero."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2


def window_mean(values: Tensor, tokens: Tensor, seed: int) -> Estimate:
    """Estimate the mean over the tokens of windows.

    Windows are resampled, not tokens: the tokens of a window depend on each other.

    Args:
        values: (windows,) mean of each window.
        tokens: (windows,) how many each has.
        seed: of the resampling.
    """
    alike = bool((tokens == tokens[0]).all())
    return _bootstrap_mean(values, seed, (int(tokens.sum()), "tokens"), "window", None if alike else tokens.double())


def sample_mean(values: Tensor, seed: int, unit: str) -> Estimate:
    """Estimate the mean over independent samples.

    Args:
        values: (samples,) value of each.
        seed: of the resampling.
        unit: what a sample is, in the plural.
    """
    return _bootstrap_mean(values, seed, (len(values), unit), unit.removesuffix("s"))


def _bootstrap_mean(
    values: Tensor, seed: int, samples: tuple[int, str], resampled: str, weights: Tensor | None = None
) -> Estimate:
    """Estimate a mean with its bootstrap percentile interval (Efron, Annals of Statistics 7, 1979).

    Args:
        values: (count,) what is resampled.
        samples: how many samples the values stand for, and what a sample is.
        resampled: what one of the values belongs to.
        weights: (count,) of the values in the mean, float64; None where they are equal.
    """
    count = len(values)
    values = values.double()
    own = Means(values, seed, resampled, weights)
    mean = float(_weighted(values, weights, torch.arange(count)[None]))
    if count < 2:
        return Estimate(mean, None, None, *samples, f"none: a single {resampled}", samples=own)
    generator = torch.Generator().manual_seed(seed)
    means = torch.cat([_weighted(values, weights, draws) for draws in _draws(count, generator)])
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(mean, low, high, *samples, f"bootstrap of {count} {resampled}s", samples=own)


def _weighted(values: Tensor, weights: Tensor | None, draws: Tensor) -> Tensor:
    """Means of resamples, (resamples,)."""
    if weights is None:
        return values[draws].mean(dim=1)
    return (values * weights)[draws].sum(dim=1) / weights[draws].sum(dim=1)


@dataclass(frozen=True, eq=False)
class Means(PairedSamples):
    """The values that a figure is the mean of, (count,): the differences are resampled, not the two means.

    Attributes:
        seed: of the resampling.
        of: what one of the values belongs to.
        weights: of the values in the mean; None where they are equal.
        exponential: the figure is exp of the mean, so that two of them have a ratio.
    """

    values: Tensor
    seed: int
    of: str
    weights: Tensor | None = None
    exponential: bool = False

    def change(self, baseline: Means) -> Change:
        differences = self.values - baseline.values
        found = _bootstrap_mean(differences, self.seed, (len(differences), ""), self.of, self.weights)
        interval = found.interval if found.low is None else f"{found.interval}, paired"
        if not self.exponential:
            return Change(found.value, found.low, found.high, "difference", interval)
        found = exponential(found)
        return Change(found.value, found.low, found.high, "ratio", interval)


def _draws(count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Resamples, (some, count) at a time, so that many values take little memory."""
    each = max(1, DRAWN // count)
    for start in range(0, RESAMPLES, each):
        yield torch.randint(count, (min(each, RESAMPLES - start), count), generator=generator)


def exponential(estimate: Estimate) -> Estimate:
    """Take exp of a figure and its limits: perplexity from the mean negative log-likelihood."""
    low, high = (None if bound is None else math.exp(bound) for bound in (estimate.low, estimate.high))
    own = estimate.samples
    samples = replace(own, exponential=True) if isinstance(own, Means) else None
    return replace(estimate, value=math.exp(estimate.value), low=low, high=high, samples=samples)
