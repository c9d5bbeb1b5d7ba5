"""Numbers about tensors and time. Nothing here prints or decides."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from aicompress.weights import Weight

Counted = Callable[[int, int], None]  # told how much of counted work is done, and how much there is
PIECE = 1 << 20  # elements compared at a time; smaller ones cost two threads more in waiting than a cache saves


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def rel_error(original: Tensor, approximate: Tensor | Weight) -> float | None:
    """‖W − Ŵ‖_F / ‖W‖_F; 0 where both are zero, None where only W is.

    Args:
        original: any floating tensor.
        approximate: a tensor of the same shape, or a stored weight, which is decoded a few rows at a time.
    """
    return relative(*squared_sums(original, approximate))


def power_sums(rows: Tensor, order: int = 2) -> Tensor:
    """Σ |x|^order of every row of a matrix, (rows,) float64, without a float64 copy of it; long rows are cut too."""
    total = torch.zeros(len(rows), dtype=torch.float64)
    for part in torch.split(rows, PIECE, dim=1):
        pieces = torch.split(part, max(1, PIECE // max(1, part.shape[1])))
        total += torch.cat([piece.double().abs_().pow_(order).sum(dim=1) for piece in pieces])
    return total


def relative(error: float, norm: float) -> float | None:
    """The relative error of ‖W − Ŵ‖² and ‖W‖²; None where there is no such share, since W is zero and Ŵ is not."""
    if norm or not math.isfinite(error):
        return (error / norm) ** 0.5 if norm else error
    return None if error else 0.0


def squared_sums(original: Tensor, approximate: Tensor | Weight) -> tuple[float, float]:
    """‖W − Ŵ‖² and ‖W‖²; those of blocks of rows add up to the whole's."""
    error, norm = _sums(original, approximate, torch.float32)
    if not representable(error, norm):
        error, norm = _sums(original, approximate, torch.float64)
    return error, norm


def representable(error: float, norm: float) -> bool:
    """Whether sums of squares that were made in float32 are far enough from its ends."""
    return 1e-20 < norm < 1e30 and error < 1e30


def _sums(original: Tensor, approximate: Tensor | Weight, dtype: torch.dtype) -> tuple[float, float]:
    """In pieces of rows that stay in cache."""
    rows = original.shape[0] if original.ndim else 1
    step = max(1, rows * PIECE // max(1, original.numel()))
    error = norm = 0.0
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        piece = original[start:stop].to(dtype)
        if isinstance(approximate, Tensor):
            other = approximate[start:stop].to(dtype, copy=True)
        else:
            other = approximate.rows(start, stop).to(dtype)
        difference, values = other.sub_(piece).reshape(-1), piece.reshape(-1)
        error += float(torch.dot(difference, difference))
        norm += float(torch.dot(values, values))
    return error, norm


def peak_rss() -> int:
    """Highest resident set of this process so far, in bytes."""
    import resource
    import sys

    # getrusage also counts the process that this one was started from, up to the exec; the kernel's own mark does not.
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class WallTimes:
    """Wall times of repeated calls, in seconds."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def p95(self) -> float:
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]


def interleaved(calls: Sequence[Callable[[], object]], rounds: int, warmup: int = 2) -> list[WallTimes]:
    """Time several calls in turn, A B A B ..., so that a drifting machine drifts for all of them.

    Args:
        calls: what to time.
        rounds: counted rounds; each calls every function once.
        warmup: rounds not counted.
    """
    samples: list[list[float]] = [[] for _ in calls]
    for turn in range(warmup + rounds):
        for slot, call in zip(samples, calls, strict=True):
            start = time.perf_counter()
            call()
            if turn >= warmup:
                slot.append(time.perf_counter() - start)
    return [WallTimes(tuple(slot)) for slot in samples]


def paired_ratio(before: WallTimes, after: WallTimes) -> tuple[float, float, float]:
    """Median of after / before over the rounds that both were timed in, and its 95 % interval.

    The interval is the sign test's, of order statistics: it asks nothing of the distribution of times. Below six
    rounds it is from the least to the greatest, which holds less than 95 %.
    """
    ratios = sorted(late / early for early, late in zip(before.samples, after.samples, strict=True))
    count, outside, left = len(ratios), 0.0, 0
    while (outside := outside + math.comb(count, left) / 2**count) <= 0.025:
        left += 1
    left = max(left - 1, 0)
    return median(ratios), ratios[left], ratios[count - 1 - left]


def directory_nbytes(path: str | os.PathLike[str]) -> int:
    """Bytes of a file, or of all files below a directory."""
    if os.path.isfile(path):
        return os.path.getsize(path)
    return sum(os.path.getsize(os.path.join(root, name)) for root, _, names in os.walk(path) for name in names)
