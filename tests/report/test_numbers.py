import pytest

from aicompress.report import numbers


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "–"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 KB"),
        (999_499, "999 KB"),
        (999_500, "1.00 MB"),
        (90_868_376, "90.9 MB"),
        (2_500_000_000, "2.50 GB"),
        (-1500, "-1.50 KB"),
    ],
)
def test_size(count: int | None, text: str) -> None:
    assert numbers.size(count) == text


def test_exact_size_adds_every_digit() -> None:
    assert numbers.exact_size(90_868_376) == "90.9 MB (90,868,376)"
    assert numbers.exact_size(12) == "12 B"
    assert numbers.exact_size(None) == "–"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (22_713_216, "22,713,216"),
        (0.0123, "0.01230"),
        (9.9999, "10.00"),
        (1.2e-7, "1.200e-07"),
        (0.0, "0"),
    ],
)
def test_number(value: float | None, text: str) -> None:
    assert numbers.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "12.3 ms"),
        (0.9999, "1.00 s"),
        (12.34, "12.3 s"),
        (252.4, "4 min 12 s"),
        (7500, "2 h 5 min"),
        (0, "0 s"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert numbers.duration(seconds) == text
