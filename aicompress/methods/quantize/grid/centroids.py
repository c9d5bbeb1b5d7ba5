"""One-dimensional k-means, weighted, many problems at once: values sorted once, every sum a difference of prefix sums.

In one dimension clusters are intervals, so few distinct values are clustered exactly by dynamic programming (Wang and
Song 2011, "Ckmeans.1d.dp"); more of them by Lloyd's iteration from quantiles of the density to the power 1/3, which is
the spacing of the optimal quantizer of many levels (Panter and Dite 1951).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aicompress.methods.quantize.grid.rounding import EPSILON, PIECE

EXACT = 64  # distinct values up to which the optimum is found
DROPPED = 12  # of the 23 bits after a float32 number's first, those that a histogram leaves out


def cluster(values: Tensor, weights: Tensor, k: int, iterations: int) -> Tensor:
    """Centroids of least Σ h (v − c)².

    Args:
        values: (problems, n).
        weights: h, (problems, n), positive.
        k: centroids of each problem.
        iterations: of Lloyd's algorithm, at most.

    Returns:
        (problems, k) ascending, in float64. Where a problem has fewer distinct values, the largest is repeated.
    """
    return centroids_of(*distinct(values.double(), weights.double()), k, iterations)


def centroids_of(points: Tensor, mass: Tensor, k: int, iterations: int) -> Tensor:
    """Centroids as of `cluster`, from each problem's distinct values in ascending order and their total weights."""
    if points.shape[1] <= k:
        return torch.nn.functional.pad(points, (0, k - points.shape[1]), value=torch.inf).minimum(points[:, -1:])
    sums = torch.stack([mass, mass * points, mass * points.square()])
    prefix = torch.nn.functional.pad(sums.cumsum(-1), (1, 0))  # (3, problems, n + 1)
    if points.shape[1] <= EXACT:
        return _exact(prefix, k)
    return _lloyd(points, prefix, _spread(points, mass, k), iterations)


def distinct(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct values of each problem in ascending order, and their total weights.

    Problems with fewer distinct values than others repeat their largest one with no weight.
    """
    points, order = values.sort(dim=1)
    weights = weights.gather(1, order)
    new = torch.nn.functional.pad(points[:, 1:] != points[:, :-1], (1, 0), value=True)
    slot = new.cumsum(1) - 1
    count = int(slot[:, -1].max()) + 1
    mass = torch.zeros(len(points), count, dtype=points.dtype).scatter_add_(1, slot, weights)
    distinct = points[:, -1:].repeat(1, count).scatter_(1, slot, points)
    return distinct, mass


def histogram(blocks: Sequence[Callable[[], Tensor]]) -> tuple[Tensor, Tensor]:
    """Values of one problem in ascending order and how many there are of each, (1, n), from functions that read parts.

    Values of at most 11 bits after the first are exact, such as those of bfloat16 and float16; others that agree so far
    are counted at their mean.
    """
    counts, sums = (torch.zeros(1 << 32 - DROPPED, dtype=torch.float64) for _ in range(2))
    for read in blocks:
        for values in torch.split(read().reshape(-1), PIECE):
            bits = (values + 0.0).view(torch.int32)  # -0.0 is 0.0
            slot = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> DROPPED) + len(counts) // 2  # in the order of the values
            counts += torch.bincount(slot, minlength=len(counts))
            sums += torch.bincount(slot, values.double(), len(counts))
    there = counts > 0
    return (sums[there] / counts[there])[None], counts[there][None]


def _cost(prefix: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """Σ h (v − mean)² of the points begin..end-1 of each problem; indices (problems, m)."""
    mass, first, second = (part.gather(1, end) - part.gather(1, begin) for part in prefix)
    cost: Tensor = (second - first.square() / mass.clamp_min(EPSILON)).clamp_min(0)
    return cost


def _means(prefix: Tensor, borders: Tensor) -> Tensor:
    """Mean of each interval of points; (problems, k) from borders (problems, k + 1). An empty one is NaN."""
    mass, first = (part.gather(1, borders).diff(dim=1) for part in prefix[:2])
    means: Tensor = first / torch.where(mass > 0, mass, torch.nan)
    return means


def _exact(prefix: Tensor, k: int) -> Tensor:
    """Optimal centroids by dynamic programming over the last border: O(k n²) for each problem."""
    problems, n = prefix.shape[1], prefix.shape[2] - 1
    if problems > 1 and problems * n * n > 1 << 22:
        return torch.cat([_exact(part, k) for part in torch.split(prefix, max(1, (1 << 22) // (n * n)), dim=1)])
    at = torch.arange(n + 1)
    begin, end = (grid.reshape(1, -1).expand(problems, -1) for grid in torch.meshgrid(at, at, indexing="ij"))
    cost = _cost(prefix, begin, end).reshape(problems, n + 1, n + 1)
    cost = torch.where(at[:, None] <= at[None, :], cost, torch.inf)
    best, cuts = cost[:, 0], []
    for _ in range(1, k):
        best, cut = (best[:, :, None] + cost).min(dim=1)  # over where the last interval begins
        cuts.append(cut)
    borders = [torch.full((problems,), n)]
    for cut in reversed(cuts):
        borders.append(cut.gather(1, borders[-1][:, None])[:, 0])
    borders.append(torch.zeros(problems, dtype=torch.long))
    return _filled(_means(prefix, torch.stack(borders[::-1], dim=1)))


def _filled(means: Tensor) -> Tensor:
    """Empty clusters take the centroid of their left neighbour, the first ones of the first that is not empty."""
    known = ~means.isnan()
    last = torch.where(known, torch.arange(means.shape[1]), -1).cummax(dim=1).values
    first = known.int().argmax(dim=1, keepdim=True)
    return means.gather(1, torch.where(last < 0, first, last))


def _spread(points: Tensor, mass: Tensor, k: int) -> Tensor:
    """Quantiles of the density to the power 1/3, estimated on equal steps of the range; (problems, k)."""
    low, high = points[:, :1], points[:, -1:]
    bins = min(512, max(16, points.shape[1] // 16))  # enough points in each for a density
    slot = ((points - low) / (high - low).clamp_min(EPSILON) * bins).long().clamp_max(bins - 1)
    density = torch.zeros(len(points), bins, dtype=points.dtype).scatter_add_(1, slot, mass)
    share = torch.nn.functional.pad((density + EPSILON).pow(1 / 3).cumsum(1), (1, 0))
    share = share / share[:, -1:]
    wanted = ((torch.arange(k, dtype=points.dtype) + 0.5) / k).expand(len(points), -1).contiguous()
    right = torch.searchsorted(share, wanted).clamp(1, bins)
    left_share, right_share = share.gather(1, right - 1), share.gather(1, right)
    inside = (wanted - left_share) / (right_share - left_share)
    return low + (high - low) * (right - 1 + inside) / bins


def _lloyd(points: Tensor, prefix: Tensor, centroids: Tensor, iterations: int) -> Tensor:
    n = points.shape[1]
    for _ in range(iterations):
        inner = torch.searchsorted(points, (centroids[:, 1:] + centroids[:, :-1]) / 2)
        means = _means(prefix, torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=n))
        moved = torch.where(means.isnan(), centroids, means)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


def nearest(values: Tensor, tables: Tensor) -> Tensor:
    """Index of the nearest table entry; (problems, n) from ascending tables (problems, k)."""
    borders = (tables[:, 1:] + tables[:, :-1]) / 2
    return torch.searchsorted(borders.contiguous(), values.contiguous())
