"""Estimate figures with their uncertainty: a value, its 95% interval, and the number of samples behind it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Z = 1.959963984540054  # 97.5% quantile of the normal distribution
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """One measured figure.

    Attributes:
        value: the figure.
        low, high: its 95% interval; None where there are too few samples for one.
        n: samples behind it.
        unit: what a sample is: "tokens", "pairs", "images".
        interval: how the interval was computed.
        baseline: the same figure of the checkpoint compared against, or None.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    unit: str
    interval: str
    baseline: float | None = None

    def beside(self, other: Estimate) -> Estimate:
        """Add a baseline's value of the same figure."""
        return replace(self, baseline=other.value)

    def plain(self) -> dict[str, Any]:
        """Give the figure as the report stores it."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def proportion(hits: int, n: int, unit: str) -> Estimate:
    """Estimate a share with its exact binomial interval (Clopper and Pearson, Biometrika 26, 1934)."""
    return Estimate(hits / n, *clopper_pearson(hits, n), n, unit, "exact binomial")


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


def window_mean(values: Tensor, n: int, seed: int) -> Estimate:
    """Estimate the mean over the tokens of equally long windows.

    Windows are resampled, not tokens: the tokens of a window depend on each other.

    Args:
        values: (windows,) mean of each window.
        n: tokens in all windows together.
        seed: of the resampling.
    """
    return _bootstrap_mean(values, seed, (n, "tokens"), "window")


def sample_mean(values: Tensor, seed: int, unit: str) -> Estimate:
    """Estimate the mean over independent samples.

    Args:
        values: (samples,) value of each.
        seed: of the resampling.
        unit: what a sample is, in the plural.
    """
    return _bootstrap_mean(values, seed, (len(values), unit), unit.removesuffix("s"))


def _bootstrap_mean(values: Tensor, seed: int, samples: tuple[int, str], resampled: str) -> Estimate:
    """Estimate a mean with its bootstrap percentile interval (Efron, Annals of Statistics 7, 1979).

    Args:
        values: (count,) what is resampled.
        samples: how many samples the values stand for, and what a sample is.
        resampled: what one of the values belongs to.
    """
    count = len(values)
    values = values.double()
    if count < 2:
        return Estimate(float(values.mean()), None, None, *samples, f"none: a single {resampled}")
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack([values[_draw(count, generator)].mean() for _ in range(RESAMPLES)])
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(values.mean()), low, high, *samples, f"bootstrap of {count} {resampled}s")


def _draw(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(count, (count,), generator=generator)


def exponential(estimate: Estimate) -> Estimate:
    """Take exp of a figure and its limits: perplexity from the mean negative log-likelihood."""
    low, high = (None if bound is None else math.exp(bound) for bound in (estimate.low, estimate.high))
    return replace(estimate, value=math.exp(estimate.value), low=low, high=high)


def ranks(values: Floats) -> Floats:
    """Rank values from 1; equal values share the mean of their ranks."""
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means: Floats = (2 * last - counts + 1) / 2
    return means[where]


def spearman(one: Floats, other: Floats) -> float:
    """Compute Spearman's rank correlation: Pearson's, of average ranks. NaN where one side is constant."""
    first, second = (ranks(side) - (len(side) + 1) / 2 for side in (one, other))
    norm = math.sqrt(float(first @ first) * float(second @ second))
    return float(first @ second) / norm if norm else math.nan


def rank_correlation(one: Floats, other: Floats, unit: str = "pairs") -> Estimate:
    """Estimate Spearman's correlation of independent pairs: Fisher's z, variance of Bonett and Wright (2000)."""
    n = len(one)
    value = spearman(one, other)
    if n < 4 or not math.isfinite(value):
        return Estimate(value, None, None, n, unit, "none: too few or constant values")
    return _fisher(value, math.sqrt((1 + value**2 / 2) / (n - 3)), n, unit, "Fisher z")


def _fisher(value: float, error: float, n: int, unit: str, interval: str) -> Estimate:
    """Estimate a correlation from the standard error of its z."""
    if abs(value) >= 1:
        return Estimate(value, value, value, n, unit, interval)
    z = math.atanh(value)
    return Estimate(value, math.tanh(z - Z * error), math.tanh(z + Z * error), n, unit, interval)


def pairwise_correlation(one: Floats, other: Floats, blocks: int = 20) -> Estimate:
    """Estimate Spearman's correlation between two matrices of similarities, over all pairs of their items.

    Pairs that share an item depend on each other, so the interval comes from leaving out blocks of items, not pairs
    (delete-a-group jackknife, on Fisher's z).

    Args:
        one, other: (items, items), symmetric.
    """
    items = len(one)
    value = _upper(one, other, np.arange(items))
    n = items * (items - 1) // 2
    if items < 2 * blocks or not abs(value) < 1:
        exact = math.isfinite(value) and abs(value) >= 1
        bound = value if exact else None
        return Estimate(value, bound, bound, n, "pairs", "exact" if exact else "none: too few sentences")
    group = np.arange(items) % blocks
    left_out = np.array([math.atanh(_upper(one, other, np.flatnonzero(group != block))) for block in range(blocks)])
    error = math.sqrt((blocks - 1) / blocks * float(((left_out - left_out.mean()) ** 2).sum()))
    return _fisher(value, error, n, "pairs", f"jackknife of {items} sentences in {blocks} groups")


def _upper(one: Floats, other: Floats, kept: NDArray[np.intp]) -> float:
    rows, columns = np.triu_indices(len(kept), k=1)
    rows, columns = kept[rows], kept[columns]
    return spearman(one[rows, columns], other[rows, columns])
