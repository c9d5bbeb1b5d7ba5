"""Estimate rank correlations with their uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aicompress.metrics.metric import Change, Estimate, PairedSamples

Floats = NDArray[np.float64]
Z = 1.959963984540054  # 97.5% quantile of the normal distribution
BLOCKS = 20  # groups that a jackknife leaves out in turn
T_BLOCKS = 2.0930240544083096  # 97.5% quantile of Student's t with BLOCKS - 1 degrees of freedom


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


def rank_correlation(one: Floats, other: Floats) -> Estimate:
    """Estimate Spearman's correlation of independent pairs: Fisher's z, variance of Bonett and Wright (2000)."""
    n, own = len(one), Ranked(one, other)
    value = spearman(one, other)
    if n < 4 or not math.isfinite(value):
        return Estimate(value, None, None, n, "pairs", "none: too few or constant values", samples=own)
    estimate = _fisher(value, math.sqrt((1 + value**2 / 2) / (n - 3)), n, "Fisher z")
    return replace(estimate, samples=own)


@dataclass(frozen=True, eq=False)
class Ranked(PairedSamples):
    """Pairs of values whose correlation is a figure, (pairs,) each: pairs are left out of both correlations at once.

    The interval is that of the delete-a-group jackknife.
    """

    one: Floats
    other: Floats

    def change(self, baseline: Ranked) -> Change:
        count = len(self.one)
        value = spearman(self.one, self.other) - spearman(baseline.one, baseline.other)
        if count < 2 * BLOCKS or not math.isfinite(value):
            return Change(value, None, None, "difference", "none: too few or constant values")
        group = np.arange(count) % BLOCKS
        kept = [group != block for block in range(BLOCKS)]
        without = np.array(
            [
                spearman(self.one[rest], self.other[rest]) - spearman(baseline.one[rest], baseline.other[rest])
                for rest in kept
            ]
        )
        error = _jackknife_error(without)
        interval = f"jackknife of {count} pairs in {BLOCKS} groups, paired"
        return Change(value, value - T_BLOCKS * error, value + T_BLOCKS * error, "difference", interval)


def _jackknife_error(without: Floats) -> float:
    """Compute the standard error of a figure from its values without each of the groups, (groups,)."""
    groups = len(without)
    return math.sqrt((groups - 1) / groups * float(((without - without.mean()) ** 2).sum()))


def _fisher(value: float, error: float, n: int, interval: str) -> Estimate:
    """Estimate a correlation from the standard error of its z."""
    if abs(value) >= 1:
        return Estimate(value, value, value, n, "pairs", interval)
    z = math.atanh(value)
    return Estimate(value, math.tanh(z - Z * error), math.tanh(z + Z * error), n, "pairs", interval)


def pairwise_correlation(one: Floats, other: Floats) -> Estimate:
    """Estimate Spearman's correlation between two matrices of similarities, over all pairs of their items.

    Pairs that share an item depend on each other, so the interval comes from leaving out blocks of items, not pairs
    (delete-a-group jackknife, on Fisher's z).

    Args:
        one, other: (items, items), symmetric.
    """
    items = len(one)
    value = _upper(one, other, np.arange(items))
    n = items * (items - 1) // 2
    if items < 2 * BLOCKS or not abs(value) < 1:
        exact = math.isfinite(value) and abs(value) >= 1
        bound = value if exact else None
        return Estimate(value, bound, bound, n, "pairs", "exact" if exact else "none: too few sentences")
    group = np.arange(items) % BLOCKS
    left_out = np.array([math.atanh(_upper(one, other, np.flatnonzero(group != block))) for block in range(BLOCKS)])
    return _fisher(value, _jackknife_error(left_out), n, f"jackknife of {items} sentences in {BLOCKS} groups")


def _upper(one: Floats, other: Floats, kept: NDArray[np.intp]) -> float:
    rows, columns = np.triu_indices(len(kept), k=1)
    rows, columns = kept[rows], kept[columns]
    return spearman(one[rows, columns], other[rows, columns])


def unit_rows(embeddings: Tensor) -> Tensor:
    """Scale rows to length 1, in float64; a zero row stays zero."""
    return torch.nn.functional.normalize(embeddings.double().cpu(), dim=1)
