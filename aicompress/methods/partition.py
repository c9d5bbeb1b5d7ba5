"""A sequence divided into contiguous parts of like values."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def contiguous_parts(values: Sequence[float], parts: int) -> list[range]:
    """Divide a sequence where the sum of squares about the means of the parts is least.

    Exact, by dynamic programming over the ends of the parts (Fisher 1958, On grouping for maximum homogeneity).

    Args:
        values: the sequence.
        parts: how many, at most as many as values.

    Returns:
        The places of each part, in order.
    """
    middle = sum(values) / len(values)
    centred = [value - middle for value in values]  # so that the difference of sums below loses no digits
    sums = [0.0, *accumulate(centred)]
    squares = [0.0, *accumulate(value * value for value in centred)]

    def spread(start: int, end: int) -> float:
        return squares[end] - squares[start] - (sums[end] - sums[start]) ** 2 / (end - start)

    best = {end: (spread(0, end), [end]) for end in range(1, len(values) + 1)}  # of the first `end` values in one part
    for count in range(2, parts + 1):
        best = {
            end: min((cost + spread(start, end), [*ends, end]) for start, (cost, ends) in best.items() if start < end)
            for end in range(count, len(values) + 1)
        }
    _, ends = best[len(values)]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]
