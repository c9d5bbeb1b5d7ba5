from __future__ import annotations

import pytest

from aicompress.report.plots import PlotAxis, fitted, scaled


def labels(axis: PlotAxis, most: int = 7) -> list[str]:
    return [label for _, label in axis.ticks(most)]


def test_values_lie_between_the_ends_in_proportion() -> None:
    axis = PlotAxis(10, 20, 0, 100)
    assert [axis.place(value) for value in (10, 12.5, 20)] == [0, 25, 100]
    assert PlotAxis(10, 20, 100, 0).place(12.5) == 75
    powers = PlotAxis(1, 100, 0, 10, logarithmic=True)
    assert powers.place(10) == pytest.approx(5)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 7, ["0", "1", "2", "3", "4", "5", "6", "7"]),
        (0, 0.113, ["0.00", "0.02", "0.04", "0.06", "0.08", "0.10"]),
        (0.65, 2.7, ["1.0", "1.5", "2.0", "2.5"]),
        (-1, 1, ["-1.0", "-0.5", "0.0", "0.5", "1.0"]),
        (0, 1.6, ["0.00", "0.25", "0.50", "0.75", "1.00", "1.25", "1.50"]),
        (0, 3e7, ["0", "5e+06", "1e+07", "1.5e+07", "2e+07", "2.5e+07", "3e+07"]),
        (0, 3e-6, ["0", "5e-07", "1e-06", "1.5e-06", "2e-06", "2.5e-06", "3e-06"]),
    ],
)
def test_ticks_are_round_numbers_within_the_axis(low: float, high: float, expected: list[str]) -> None:
    assert labels(PlotAxis(low, high, 0, 1)) == expected


def test_a_logarithmic_axis_has_ticks_at_one_two_and_five() -> None:
    assert labels(PlotAxis(0.15, 12, 0, 1, logarithmic=True)) == ["0.2", "0.5", "1", "2", "5", "10"]
    assert labels(PlotAxis(1e-6, 1, 0, 1, logarithmic=True)) == [
        "1e-06", "1e-05", "0.0001", "0.001", "0.01", "0.1", "1",
    ]  # fmt: skip
    assert len(PlotAxis(1e-30, 1, 0, 1, logarithmic=True).ticks(7)) == 11


def test_a_margin_is_free_at_both_ends() -> None:
    axis = fitted([2, 4], (0, 1), 0.25)
    assert (axis.low, axis.high) == (1.5, 4.5)
    assert fitted([3, 3], (0, 1), 0).low < 3 < fitted([3, 3], (0, 1), 0).high
    assert fitted([0], (0, 1), 0).low < 0 < fitted([0], (0, 1), 0).high


def test_only_positive_values_over_a_large_factor_get_a_logarithmic_axis() -> None:
    assert scaled([1, 100], (0, 1), 0.05).logarithmic
    assert not scaled([1, 10], (0, 1), 0.05).logarithmic
    assert not scaled([0, 100], (0, 1), 0.05).logarithmic
    assert not scaled([-1, 100], (0, 1), 0.05).logarithmic
