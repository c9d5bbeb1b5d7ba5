import math

import numpy as np
import pytest
import torch

from aicompress.metrics.correlation import pairwise_correlation, rank_correlation, ranks, spearman
from aicompress.metrics.intervals import clopper_pearson, exponential, proportion, sample_mean, share, window_mean
from aicompress.metrics.metric import Estimate


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (0, 10, 0.0, 1 - 0.025 ** (1 / 10)),  # both ends have a closed form
        (10, 10, 0.025 ** (1 / 10), 1.0),
        (5, 10, 0.187086, 0.812914),  # from tables of the beta distribution
        (1, 10, 0.002529, 0.445016),
        (8, 10, 0.443905, 0.974789),
        (1, 1, 0.025, 1.0),
    ],
)
def test_clopper_pearson_agrees_with_tables(hits: int, n: int, low: float, high: float) -> None:
    assert clopper_pearson(hits, n) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))


def test_clopper_pearson_of_many_samples_nears_the_normal_interval() -> None:
    low, high = clopper_pearson(6000, 10_000)
    half = 1.96 * math.sqrt(0.6 * 0.4 / 10_000)
    assert (low, high) == (pytest.approx(0.6 - half, abs=1e-4), pytest.approx(0.6 + half, abs=1e-4))


def test_clopper_pearson_is_symmetric() -> None:
    low, high = clopper_pearson(3, 17)
    assert clopper_pearson(14, 17) == (pytest.approx(1 - high), pytest.approx(1 - low))


def test_ties_share_the_mean_of_their_ranks() -> None:
    assert ranks(np.array([10.0, 20.0, 20.0, 5.0, 20.0])).tolist() == [2.0, 4.0, 4.0, 1.0, 4.0]


def test_spearman_with_ties_by_hand() -> None:
    # Ranks 1 2.5 2.5 4 and 1 3 2 4; centred products 2.25 + 0 + 0 + 2.25; squares 4.5 and 5.
    found = spearman(np.array([1.0, 2.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0, 4.0]))
    assert found == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_spearman_sees_order_only() -> None:
    values = np.linspace(-3, 3, 50)
    assert spearman(values, np.exp(values)) == pytest.approx(1.0)
    assert spearman(values, -(values**3)) == pytest.approx(-1.0)


def test_spearman_of_a_constant_is_no_number() -> None:
    assert math.isnan(spearman(np.ones(5), np.arange(5.0)))


def test_rank_correlation_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    truth = 6 / math.pi * math.asin(0.6 / 2)  # Spearman's of a normal pair with Pearson's 0.6
    covered = 0
    for _ in range(200):
        one = generator.normal(size=60)
        found = rank_correlation(one, 0.6 * one + 0.8 * generator.normal(size=60))
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= truth <= found.high
    assert 180 <= covered <= 199


def test_bootstrap_interval_is_that_of_the_mean() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(1))
    found = window_mean(values, torch.full((400,), 255), seed=0)
    error = float(values.std()) / math.sqrt(400)
    assert found.value == pytest.approx(float(values.mean()))
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.15 * error)
    assert found.n == 102_000


def test_bootstrap_is_seeded() -> None:
    values = torch.rand(30)
    assert window_mean(values, torch.ones(30), seed=3) == window_mean(values, torch.ones(30), seed=3)
    assert window_mean(values, torch.ones(30), seed=3) != window_mean(values, torch.ones(30), seed=4)


def test_samples_are_resampled_as_windows_are() -> None:
    values = torch.rand(30)
    samples, windows = sample_mean(values, 3, "texts"), window_mean(values, torch.full((30,), 255), seed=3)
    assert (samples.value, samples.low, samples.high) == (windows.value, windows.low, windows.high)
    assert (samples.n, samples.unit, samples.interval) == (30, "texts", "bootstrap of 30 texts")
    assert (windows.n, windows.unit, windows.interval) == (30 * 255, "tokens", "bootstrap of 30 windows")


def test_one_window_has_no_interval() -> None:
    found = window_mean(torch.tensor([2.0]), torch.tensor([255]), seed=0)
    assert (found.low, found.high, found.interval) == (None, None, "none: a single window")
    assert exponential(found).value == pytest.approx(math.exp(2))


def test_exponential_takes_the_limits_along() -> None:
    found = exponential(Estimate(1.0, 0.5, 1.5, 10, "tokens", "x"))
    assert (found.value, found.low, found.high) == pytest.approx((math.e, math.exp(0.5), math.exp(1.5)))


def test_pairwise_correlation_counts_every_pair_once() -> None:
    generator = np.random.default_rng(0)
    points = generator.normal(size=(60, 8))
    noisy = points + 0.2 * generator.normal(size=points.shape)
    one, other = points @ points.T, noisy @ noisy.T
    found = pairwise_correlation(one, other)
    upper = np.triu_indices(60, k=1)
    assert found.value == pytest.approx(spearman(one[upper], other[upper]))
    assert found.n == 60 * 59 // 2
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.value < found.high < 1


def test_pairwise_correlation_with_itself_is_one() -> None:
    points = np.random.default_rng(0).normal(size=(50, 4))
    found = pairwise_correlation(points @ points.T, points @ points.T)
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))


def test_two_perplexities_of_the_same_windows_are_far_nearer_than_their_intervals_say() -> None:
    """The windows differ by far more than the models do: unpaired intervals overlap, the ratio is sure to 0.1 %."""
    generator = torch.Generator().manual_seed(0)
    nll = 4.33 + 0.3 * torch.randn(400, generator=generator)
    tested, baseline = (
        exponential(window_mean(values, torch.full((400,), 255), seed=0))
        for values in (nll + 0.0016 + 0.01 * torch.randn(400, generator=generator), nll)
    )
    figure = tested.beside(baseline)
    assert figure.low is not None
    assert figure.low < baseline.value
    change = figure.change
    assert change is not None
    assert change.kind == "ratio"
    assert change.value == pytest.approx(tested.value / baseline.value)
    assert change.low == pytest.approx(change.value - 1.96 * 0.01 / 20, abs=2e-4)
    assert change.high == pytest.approx(change.value + 1.96 * 0.01 / 20, abs=2e-4)
    assert change.low > 1


def test_the_interval_of_two_shares_comes_from_the_samples_that_only_one_has_right() -> None:
    one, other = torch.ones(100, dtype=torch.bool), torch.ones(100, dtype=torch.bool)
    other[:8], one[8:10] = False, False
    change = share(one, "images").beside(share(other, "images")).change
    assert change is not None
    assert change.value == pytest.approx(0.06)
    assert (change.low, change.high) == pytest.approx((-0.0039, 0.1215), abs=1e-4)  # of 8.5 and 2.5 in 102
    same = share(one, "images").beside(share(one, "images")).change
    assert same is not None
    assert (same.value, same.low) == (0, pytest.approx(-1.96 / 102, abs=1e-4))


def test_correlations_of_the_same_pairs_are_compared_pair_by_pair() -> None:
    """The truth is in the interval about as often as it says, and that is narrower than of two samples."""
    covered, widths = 0, []
    for seed in range(40):
        generator = np.random.default_rng(seed)
        scores = generator.normal(size=200)
        baseline = 0.6 * scores + 0.8 * generator.normal(size=200)
        tested = baseline + 0.1 * generator.normal(size=200)
        figure = rank_correlation(tested, scores).beside(rank_correlation(baseline, scores))
        change = figure.change
        assert change is not None
        assert None not in (change.low, change.high, figure.low, figure.high)
        truth = 6 / math.pi * (math.asin(0.6 / math.sqrt(1.01) / 2) - math.asin(0.6 / 2))
        covered += change.low <= truth <= change.high  # type: ignore[operator]
        widths.append((change.high - change.low) / (figure.high - figure.low))  # type: ignore[operator]
    assert covered >= 34
    assert max(widths) < 0.5


def test_a_figure_without_samples_has_no_change() -> None:
    figure = proportion(8, 10, "images").beside(proportion(9, 10, "images"))
    assert figure.change is None
    assert "change" not in figure.plain()


def test_proportion_in_the_report() -> None:
    plain = proportion(8, 10, "images").plain()
    assert plain["value"] == 0.8
    assert plain["n"] == 10
    assert plain["interval"] == "exact binomial"
    assert "baseline" not in plain
