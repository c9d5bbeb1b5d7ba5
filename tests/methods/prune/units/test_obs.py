"""Structured OBS: least squares by hand, the cheapest units by hand, and what it exists for: less output error."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from aicompress.errors import CompressError
from aicompress.methods.prune.units import obs
from aicompress.methods.prune.units.units import UnitsConfig, keep, refit, statistics
from aicompress.methods.structural import Part, Structure
from aicompress.statistics import InputStats
from tests.methods.layers import columns_of

TINY = 1e-9


def error(consumer: obs.Consumer, kept: Sequence[int]) -> float:
    """E‖W x − W' x_K‖² of the refitted consumer, damping included."""
    rows = consumer.rows(kept)
    factor = torch.linalg.cholesky(consumer.second[rows][:, rows])
    reached = torch.linalg.solve_triangular(factor, consumer.right[rows], upper=False).square().sum()
    return float((consumer.weight * (consumer.second @ consumer.weight)).sum() - reached)


def config(**fields: object) -> UnitsConfig:
    return UnitsConfig(**{"name": "units", "score": "obs", "damping": TINY, **fields})


def seen(rows: Tensor, original: Tensor | None = None) -> InputStats:
    """Statistics of rows (tokens, in)."""
    x, before = rows.double(), (rows if original is None else original).double()
    gram = x.t() @ x / len(x)
    return InputStats.of(len(x), gram, columns_of(x), before.t() @ x / len(x), original_mean=before.mean(0))


def structure(weight: Tensor, inputs: InputStats, span: int = 1, bias: Tensor | None = None) -> Structure:
    """A consumer (out, in) of units of `span` inputs."""
    units = weight.shape[1] // span
    parts = [Part("down.weight", "down", "consumer", 0, lambda: weight.t().reshape(units, -1), span)]
    if bias is not None:
        parts.append(Part("down.bias", "down", "offset", 0, lambda: bias[None]))
    return Structure("mlp", units, tuple(parts), inputs={"down.weight": inputs})


def correlated(tokens: int, width: int, seed: int = 0, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    return torch.randn(tokens, width, generator=generator) @ mixing + mean * torch.randn(width, generator=generator)


def test_a_copy_goes_and_its_twin_takes_over() -> None:
    """x0 = x2 and x1 apart: without x0, the column of x2 becomes the sum of both, by hand."""
    a, b = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    rows = torch.stack([a, b, a], dim=1)
    weight = torch.tensor([[3.0, 0.5, 1.0], [0.0, 0.5, 2.0]])
    found = structure(weight, seen(rows))
    kept = keep(found, 2, config(damping=1e-6))
    assert kept == [0, 1]  # the twins cost nothing; of equals the later goes
    values = refit(found, kept, config(damping=1e-6))["down.weight"].t()  # (out, kept)
    torch.testing.assert_close(values, torch.tensor([[4.0, 0.5], [2.0, 0.5]]), atol=1e-4, rtol=0)


def test_a_unit_without_spread_goes_into_the_bias() -> None:
    """A constant input 2 with weights (1, -3) is a bias of (2, -6)."""
    rows = torch.stack([torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.full((4,), 2.0)], dim=1)
    weight, bias = torch.tensor([[1.0, 1.0], [1.0, -3.0]]), torch.tensor([10.0, 20.0])
    found = structure(weight, seen(rows), bias=bias)
    assert keep(found, 1, config()) == [0]
    made = refit(found, [0], config())
    torch.testing.assert_close(made["down.bias"], torch.tensor([[12.0, 14.0]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(made["down.weight"], torch.tensor([[1.0, 1.0]]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("span", [1, 3])
@pytest.mark.parametrize("biased", [False, True])
def test_the_refit_is_least_squares(span: int, biased: bool) -> None:
    rows, weight = correlated(400, 12, mean=1.0), torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    bias = torch.ones(5) if biased else None
    found = structure(weight, seen(rows), span, bias)
    kept = keep(found, 8 // span, config())
    made = refit(found, kept, config())
    columns = [unit * span + entry for unit in kept for entry in range(span)]
    design, target = rows[:, columns].double(), rows.double() @ weight.double().t()
    if biased:
        design, target = torch.cat([design, torch.ones(400, 1, dtype=torch.float64)], dim=1), target + 1
    expected = torch.linalg.lstsq(design, target).solution
    torch.testing.assert_close(made["down.weight"].reshape(-1, 5).double(), expected[: len(columns)], atol=1e-5, rtol=0)
    if biased:
        torch.testing.assert_close(made["down.bias"][0].double(), expected[-1], atol=1e-5, rtol=0)


def test_the_refit_aims_at_the_original_output_when_shifted() -> None:
    before = correlated(400, 8, mean=1.0)
    now = before + 0.2 * correlated(400, 8, seed=3, mean=1.0)
    weight, bias = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(4)
    found = structure(weight, seen(now, before), bias=bias)
    made = refit(found, [0, 1, 2, 5, 6], config(shift=1.0))
    design = torch.cat([now[:, [0, 1, 2, 5, 6]], torch.ones(400, 1)], dim=1).double()
    expected = torch.linalg.lstsq(design, before.double() @ weight.double().t()).solution
    torch.testing.assert_close(made["down.weight"].double(), expected[:-1], atol=1e-5, rtol=0)
    torch.testing.assert_close(made["down.bias"].double(), expected[-1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("span", [1, 2])
def test_losses_are_what_a_removal_costs(span: int) -> None:
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    found = structure(weight, seen(correlated(200, 8)), span)
    (consumer,) = obs.consumers(found, TINY)
    everything = range(found.size)
    left = obs._Left.of(consumer)
    left.without(torch.tensor([1]))
    units = [unit for unit in everything if unit != 1]
    before = error(consumer, units)
    costs = [error(consumer, [u for u in units if u != gone]) - before for gone in units]
    torch.testing.assert_close(left.losses(torch.tensor(units)), torch.tensor(costs, dtype=torch.float64))


def test_removal_is_near_the_best_of_all_choices_and_beats_weight_norm() -> None:
    for seed in range(4):
        weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(seed))
        found = structure(weight, seen(correlated(300, 9, seed)))
        (consumer,) = obs.consumers(found, TINY)
        chosen = error(consumer, keep(found, 6, config()))
        best = min(error(consumer, kept) for kept in itertools.combinations(range(9), 6))
        norms = error(consumer, keep(found, 6, config(score="product")))
        assert best <= chosen <= 1.5 * best
        assert chosen <= norms


def test_many_units_go_in_few_steps_and_lose_little_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(20, 300, generator=torch.Generator().manual_seed(1))
    found = structure(weight, seen(correlated(2000, 300)))
    (consumer,) = obs.consumers(found, 1e-4)
    few = error(consumer, obs.chosen(found, [consumer], 100))
    monkeypatch.setattr(obs, "ROUNDS", 10_000)
    single = error(consumer, obs.chosen(found, [consumer], 100))
    assert 0.97 * single <= few <= 1.03 * single


def test_dead_inputs_and_zero_columns_go_first() -> None:
    rows, weight = correlated(100, 6), torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    rows[:, 2] = 0
    weight[:, 4] = 0
    found = structure(weight, seen(rows))
    assert keep(found, 4, config(damping=1e-3)) == [0, 1, 3, 5]
    assert torch.isfinite(refit(found, [0, 2], config(damping=1e-3))["down.weight"]).all()


def test_groups_keep_as_many_each() -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    weight[:, :4] *= 0.01
    found = structure(weight, seen(correlated(100, 8)))
    assert keep(found, 4, config()) == [4, 5, 6, 7]
    grouped = replace(found, groups=2)
    for score in ("obs", "product", "activation"):
        kept = keep(grouped, 4, config(score=score))
        assert [sum(unit // 4 == group for unit in kept) for group in (0, 1)] == [2, 2]


def test_activation_is_the_mean_of_a_units_entries() -> None:
    rows = torch.tensor([[1.0, -3.0, 5.0, 0.0], [1.0, 1.0, -5.0, 0.0]])
    found = structure(torch.ones(2, 4), seen(rows), span=2)
    assert keep(found, 1, config(score="activation")) == [1]  # (1 + 2) / 2 against (5 + 0) / 2


def test_what_is_read() -> None:
    assert statistics(config()) == {"gram", "mean"}
    assert statistics(config(score="activation")) == {"mean_abs"}
    assert statistics(config(score="activation", refit=True)) == {"gram", "mean", "mean_abs"}
    assert statistics(config(score="product")) == frozenset()
    bare = Structure("mlp", 4, structure(torch.ones(2, 4), InputStats(1)).parts)
    with pytest.raises(CompressError, match="no Gram matrix"):
        keep(bare, 2, config())
