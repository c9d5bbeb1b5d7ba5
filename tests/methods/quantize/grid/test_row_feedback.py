"""Rounding by rows whose errors count together: later rows make up for earlier ones."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from aicompress.layer import Layer
from aicompress.methods.quantize import gptq
from aicompress.methods.quantize.gptq import METHOD as GPTQ
from aicompress.methods.quantize.grid import two_sides
from aicompress.methods.quantize.grid.row_feedback import ROWS, rounded_by_rows
from aicompress.methods.quantize.kmeans import METHOD as KMEANS
from aicompress.methods.quantize.rtn import METHOD as RTN
from aicompress.methods.span_metric import SpanMetric
from aicompress.statistics import InputStats
from aicompress.weights import Dense, Weight
from tests.methods.layers import layer_of, randn


def metric(count: int) -> torch.Tensor:
    """Of rows whose errors partly cancel."""
    spread = randn(count, count // 2, seed=7).double()
    return spread @ spread.t() / count + 0.05 * torch.eye(count, dtype=torch.float64)


def layer(rows: int, columns: int = 32) -> Layer:
    gram = randn(columns, columns, seed=3)
    gram = gram @ gram.t() / columns + torch.eye(columns)
    return replace(layer_of(randn(rows, columns)), inputs=InputStats.of(999, gram, {}, gram))


def test_rows_to_come_make_up_for_those_that_became_zero() -> None:
    """By −P_RR⁻¹ P_RB E_B, which is least tr(P E Eᵀ) for the error E_B = −W_B of the first rows."""
    given, weighed, half = layer(2 * ROWS), metric(2 * ROWS), slice(0, ROWS)

    def apply(part: Layer, config: Any) -> Weight:
        first = torch.equal(part.weight, given.weight[half])
        return Dense(torch.zeros_like(part.weight) if first else part.weight)

    def outline(info: Any, config: Any) -> Weight:
        return Dense.outline(info.shape, torch.float32)

    method = replace(RTN, apply=apply, outline=outline)
    after = rounded_by_rows(given, weighed, method, RTN.config()).dense()
    assert not after[half].any()
    moved = torch.linalg.solve(weighed[ROWS:, ROWS:], weighed[ROWS:, half] @ given.weight[half].double())
    torch.testing.assert_close(after[ROWS:], given.weight[ROWS:] + moved.float(), rtol=1e-2, atol=1e-2)


def test_a_span_that_is_left_out_gives_the_codes_of_its_matrix() -> None:
    """No matrix of as many rows and columns is made of it."""
    given, config = layer(20 * ROWS + 4), RTN.config(bits=2, group_size=16)  # type: ignore[call-arg]
    span = SpanMetric(torch.linalg.qr(randn(len(given.weight), 12, seed=5).double()).Q, 0.98)
    fed, wanted = (rounded_by_rows(given, each, RTN, config) for each in (span, span.matrix()))
    assert torch.equal(fed.dense(), wanted.dense())
    assert not torch.equal(fed.dense(), RTN.apply(given, config).dense())


@pytest.mark.parametrize("method", [RTN, GPTQ], ids=lambda method: method.name)
@pytest.mark.parametrize("symmetric", [True, False])
def test_less_is_lost_in_the_same_form(method: Any, symmetric: bool) -> None:
    """With a last block that is no whole one, and zero points that share words."""
    given, config = layer(20 * ROWS + 4), method.config(bits=4, group_size=16, symmetric=symmetric)
    weighed = metric(len(given.weight))
    whole, fed = method.apply(given, config), rounded_by_rows(given, weighed, method, config)
    assert fed.specs() == whole.specs()
    assert fed.meta() == whole.meta()
    errors = [each.dense().double() - given.weight for each in (whole, fed)]
    assert given.inputs is not None
    assert given.inputs.gram is not None
    gram = given.inputs.gram.double() if method is GPTQ else torch.eye(32, dtype=torch.float64)
    lost = [float(((weighed @ error) * (error @ gram)).sum()) for error in errors]
    assert lost[1] < 0.6 * lost[0]


def test_inputs_are_worked_on_once_for_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    made, factors = [], gptq.inverse_factor
    monkeypatch.setattr(gptq, "inverse_factor", lambda *given: made.append(given) or factors(*given))
    given, by_blocks = layer(16 * ROWS), replace(GPTQ, two_sided=None)
    rounded_by_rows(given, metric(16 * ROWS), by_blocks, GPTQ.config(bits=4, group_size=16))  # type: ignore[call-arg]
    assert len(made) == 1


def lost(given: Layer, weighed: torch.Tensor, weight: Weight) -> float:
    """tr(P E H Eᵀ)."""
    error = weight.dense().double() - given.weight
    assert given.inputs is not None
    assert given.inputs.gram is not None
    return float(((weighed @ error) * (error @ given.inputs.gram.double())).sum())


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_that_know_both_sides_lose_less_than_blocks_and_less_with_every_sweep(
    monkeypatch: pytest.MonkeyPatch, symmetric: bool
) -> None:
    given = layer(20 * ROWS + 4)
    weighed, config = metric(len(given.weight)), GPTQ.config(bits=4, group_size=16, symmetric=symmetric)  # type: ignore[call-arg]
    by_blocks = lost(given, weighed, rounded_by_rows(given, weighed, replace(GPTQ, two_sided=None), config))
    errors = []
    for sweeps in range(4):
        monkeypatch.setattr(two_sides, "SWEEPS", sweeps)
        errors.append(lost(given, weighed, rounded_by_rows(given, weighed, GPTQ, config)))
    assert all(after < before for before, after in pairwise(errors))
    assert errors[-1] < 0.97 * by_blocks


def test_without_a_compiler_blocks_of_rows_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    given, weighed = layer(16 * ROWS), metric(16 * ROWS)
    config = GPTQ.config(bits=4, group_size=16)  # type: ignore[call-arg]
    wanted = rounded_by_rows(given, weighed, replace(GPTQ, two_sided=None), config)
    monkeypatch.setattr(two_sides, "can_round", lambda: False)
    assert torch.equal(rounded_by_rows(given, weighed, GPTQ, config).dense(), wanted.dense())


def test_rows_that_count_nothing_are_rounded_all_the_same() -> None:
    given = layer(2 * ROWS)
    weight = rounded_by_rows(given, torch.zeros(2 * ROWS, 2 * ROWS), GPTQ, GPTQ.config(bits=4, group_size=16))  # type: ignore[call-arg]
    assert float((weight.dense() - given.weight).norm() / given.weight.norm()) < 0.1


def test_rows_that_share_something_are_rounded_at_once() -> None:
    given, weighed = layer(16 * ROWS), metric(16 * ROWS)
    for method, config in ((RTN, {"bits": 4, "granularity": "tensor"}), (KMEANS, {"granularity": "tensor"})):
        parameters = method.config.model_validate(config)
        whole, same = method.apply(given, parameters), rounded_by_rows(given, weighed, method, parameters)
        assert torch.equal(whole.dense(), same.dense())
