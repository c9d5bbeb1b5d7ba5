import pytest

from aicompress.report.quality import Figure, direction, figures


def test_plain_numbers_dicts_and_sections() -> None:
    found = figures(
        {
            "kl": 0.5,
            "accuracy": {"value": 0.9, "low": 0.8, "high": 0.95, "n": 10, "baseline": 0.91},
            "novel": {"mse": 2},
        }
    )
    assert found == {
        "kl": Figure(0.5, None, None, None, None, "lower"),
        "accuracy": Figure(0.9, 0.8, 0.95, 10, 0.91, "higher"),
        "novel.mse": Figure(2, None, None, None, None, "lower"),
    }


def test_a_figure_that_is_no_finite_number_has_no_value() -> None:
    assert [figures({"kl": bad})["kl"].value for bad in (None, float("nan"), float("inf"), True, "0.1")] == [None] * 5


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("kl", "lower"),
        ("novel.perplexity", "lower"),
        ("sts_spearman", "higher"),
        ("top1_agreement", "higher"),
        ("accuracy_loss", None),
        ("surprise", None),
    ],
)
def test_direction_comes_from_the_name(name: str, better: str | None) -> None:
    assert direction(name) == better


def test_a_stated_direction_wins_over_the_name() -> None:
    assert figures({"surprise": {"value": 1.0, "better": "higher"}})["surprise"].better == "higher"
