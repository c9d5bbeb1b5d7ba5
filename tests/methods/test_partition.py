"""The division of a sequence into contiguous parts is the best of all."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest

from aicompress.methods.partition import contiguous_parts


def spread(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
def test_no_division_has_less_spread(parts: int) -> None:
    draw = random.Random(parts)
    for _ in range(20):
        values = [draw.choice((-9.0, -3.0, 4.0)) + draw.gauss(0, 1) for _ in range(7)]
        divided = contiguous_parts(values, parts)
        assert [place for part in divided for place in part] == list(range(7))
        assert len(divided) == parts
        every = [[0, *inner, 7] for inner in combinations(range(1, 7), parts - 1)]
        least = min(sum(spread(values[a:b]) for a, b in pairwise(ends)) for ends in every)
        assert sum(spread(values[part.start : part.stop]) for part in divided) == pytest.approx(least, abs=1e-9)


def test_like_values_are_together() -> None:
    assert contiguous_parts([5.0, 4.9, 0.0, 0.1, 0.2, 3.0], 3) == [range(2), range(2, 5), range(5, 6)]
