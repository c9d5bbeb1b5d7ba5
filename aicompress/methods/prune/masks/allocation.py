"""How much of every layer stays, decided from what calibration tells of all of them; the total is the recipe's.

owl     more where more of a block's scores are outliers: Yin et al. 2024, arXiv:2310.05175, section 3.2
auto    least measured loss: every layer is pruned to several sparsities, each error E costs about
        1/2 Σ_i c_i (E H Eᵀ)_ii with H the Gram matrix and c_i the energy of the loss's gradient in output i, and what
        all may keep together is spent where it saves most (the knapsack of `methods.budget`)
global  one threshold for all scores: `global_threshold.share_globally`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aicompress.layer import Layer
from aicompress.methods.budget import least_loss
from aicompress.methods.curvature import gradients, gram, importance

STEPS = (0.4, 0.6, 0.8, 1.0, 1.25, 1.6, 2.2)  # densities at which losses are measured, relative to the average
POINTS = 41  # densities to choose from, between the least and the greatest of them


@dataclass(frozen=True)
class SparsityShare:
    """A layer that shares a sparsity with others.

    Attributes:
        size: its number of weights.
        unit: weights that stay or go together: one, a block, or one of every row.
        group: layers that get the same density; None for a layer of its own.
    """

    size: int
    unit: int = 1
    group: int | None = None


def outliers(layer: Layer, factor: float) -> float:
    """The share of |w| √E[x²] that exceeds `factor` times its mean (equation 1)."""
    scores = layer.weight.abs() * importance(layer).sqrt()
    return float((scores > factor * scores.mean()).float().mean())


def by_outliers(shares: Sequence[SparsityShare], outlying: Sequence[float], kept: int, spread: float) -> list[int]:
    """OWL: densities within ± `spread` of the average, linear in each group's share of outliers.

    Args:
        shares: the layers.
        outlying: share of outliers by layer.
        kept: weights that stay of all together.
        spread: λ.

    Returns:
        Weights that stay of each layer.
    """
    sizes = np.array([share.size for share in shares], dtype=float)
    keys = [share.group if share.group is not None else -1 - n for n, share in enumerate(shares)]
    means = {
        key: float(np.average([f for f, k in zip(outlying, keys, strict=True) if k == key],
                              weights=[s for s, k in zip(sizes, keys, strict=True) if k == key]))
        for key in keys
    }  # fmt: skip
    low, high = min(means.values()), max(means.values())
    tilt = np.array([2 * spread * (means[key] - low) / (high - low) if high > low else 0.0 for key in keys])
    return exact(shares, _shifted(tilt, sizes, kept), kept)


def _shifted(densities: np.ndarray, sizes: np.ndarray, kept: int) -> list[float]:
    """Densities moved together, within [0, 1], until they keep what they shall."""
    low, high = -1.0 - densities.max(), 1.0 - densities.min()
    for _ in range(60):
        middle = (low + high) / 2
        if (sizes * (densities + middle).clip(0, 1)).sum() < kept:
            low = middle
        else:
            high = middle
    return [float(d) for d in (densities + high).clip(0, 1)]


def exact(shares: Sequence[SparsityShare], densities: Sequence[float], kept: int) -> list[int]:
    """Whole units that add up to `kept`, as nearly as units allow and never above it; at least one of each layer."""
    wanted = [share.size * density / share.unit for share, density in zip(shares, densities, strict=True)]
    units = [max(1, min(int(want), share.size // share.unit)) for want, share in zip(wanted, shares, strict=True)]
    left = kept - sum(count * share.unit for count, share in zip(units, shares, strict=True))
    order = sorted(range(len(shares)), key=lambda n: units[n] - wanted[n])  # those that were rounded down most first
    while left < 0:
        richest = max(range(len(shares)), key=lambda n: units[n] * shares[n].unit)
        units[richest] -= 1
        left += shares[richest].unit
    moved = True
    while left > 0 and moved:
        moved = False
        for number in order:
            share = shares[number]
            room = share.size // share.unit - units[number]
            if share.unit <= left and room > 0:
                more = max(1, min(room, left // share.unit // len(shares)))
                units[number] += more
                left -= more * share.unit
                moved = True
    return [count * share.unit for count, share in zip(units, shares, strict=True)]


def options(share: SparsityShare, density: float) -> list[int]:
    """Numbers of weights to measure a layer's loss at, ascending."""
    counts = {round(share.size * min(1.0, density * step) / share.unit) * share.unit for step in STEPS}
    return sorted(max(share.unit, min(count, share.size // share.unit * share.unit)) for count in counts)


def loss(layer: Layer, pruned: Tensor) -> float:
    """1/2 Σ_i c_i (E H Eᵀ)_ii of the error E = W - Ŵ, (out, in): about what the model's loss changes by.

    The energy c_i = Σ_j E[g_ij²] / Σ_j H_jj is that of output i's gradient, where it is independent of the inputs
    (Martens and Grosse 2015, arXiv:1503.05671, section 3).
    """
    moments, second = gradients(layer).square.double(), gram(layer)
    energy = moments.sum(dim=1) / second.diagonal().sum().clamp_min(1e-300)
    error = layer.weight.double() - pruned.double()
    return 0.5 * float((energy * ((error @ second) * error).sum(dim=1)).sum())


def by_losses(
    shares: Sequence[SparsityShare], counts: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], kept: int
) -> list[int]:
    """Least total loss at `kept` weights in all.

    Args:
        shares: the layers.
        counts: by layer the numbers of weights at which its loss was measured, ascending.
        losses: as many.
        kept: weights that stay of all together.

    Returns:
        Weights that stay of each layer.
    """
    finer = [_finer(c, row, share.unit) for c, row, share in zip(counts, losses, shares, strict=True)]
    floor = sum(c[0] for c, _ in finer)
    if floor > kept:
        return exact(shares, [kept / sum(share.size for share in shares)] * len(shares), kept)
    choice = least_loss([c for c, _ in finer], [row for _, row in finer], kept)
    picked = [c[pick] for (c, _), pick in zip(finer, choice.picks, strict=True)]
    return exact(shares, [count / share.size for count, share in zip(picked, shares, strict=True)], kept)


def _finer(counts: Sequence[int], losses: Sequence[float], unit: int) -> tuple[list[float], list[float]]:
    """A layer's losses at many numbers of weights: between the measured ones their logarithm is linear."""
    if len(counts) == 1:
        return [float(counts[0])], [float(losses[0])]
    points = np.unique(np.linspace(counts[0], counts[-1], POINTS) // unit * unit)
    least = max(max(losses), 1e-300) * 1e-9
    interpolated = np.exp(np.interp(points, counts, np.log(np.maximum(losses, least))))
    return points.tolist(), interpolated.tolist()


Measure = Callable[[int], Tensor]  # weights that stay -> the pruned matrix (out, in)


def measured(layer: Layer, counts: Sequence[int], prune: Measure) -> list[float]:
    """A layer's loss at several numbers of weights; 0 where all stay."""
    whole = layer.weight.numel()
    with torch.no_grad():
        return [0.0 if count >= whole else loss(layer, prune(count)) for count in counts]
