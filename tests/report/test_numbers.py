import pytest

from aicompress.errors import RecipeError
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


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (1.00161, 1.00063, 1.00259, "1.0016× (1.0006 to 1.0026)"),
        (-12.3, -20.0, -4.0, "-12× (-20 to -4)"),
        (0.5, 0.5, 0.5, "0.5000× (0.5000 to 0.5000)"),
        (1.0, None, None, "1.000×"),
    ],
)
def test_a_spread_has_the_digits_that_its_interval_leaves(
    value: float, low: float | None, high: float | None, text: str
) -> None:
    assert numbers.spread(value, low, high, "×") == text


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


@pytest.mark.parametrize(
    ("text", "count"),
    [("5GB", 5 * 10**9), ("512 mib", 512 << 20), ("1e6", 10**6), (".5kB", 500), ("2.5TiB", 5 << 39), (" 7 ", 7)],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert numbers.parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", ".", "1.2.3", "5 apples", "-1GB", "5G", "GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="is not a size"):
        numbers.parse_bytes(text)
