"""The uniform layer map."""

from __future__ import annotations

import pytest

from aicompress.methods.distill.layers import uniform_map


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (3, 6, [(1, 2), (2, 4), (3, 6)]),
        (4, 4, [(1, 1), (2, 2), (3, 3), (4, 4)]),
        (4, 6, [(1, 2), (2, 3), (3, 5), (4, 6)]),  # 1.5 and 4.5 are rounded up
        (1, 12, [(1, 12)]),
    ],
)
def test_layers_are_spread_evenly(student: int, teacher: int, expected: list[tuple[int, int]]) -> None:
    assert uniform_map((), student, teacher) == expected


def test_chosen_layers_and_the_input() -> None:
    assert uniform_map((0, 3), 3, 6) == [(0, 0), (3, 6)]
