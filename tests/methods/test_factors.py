"""Factors made ready for rounding: their product stays, and rounding them costs less."""

from __future__ import annotations

import pytest
import torch

from aicompress.methods.curvature import loss
from aicompress.methods.factorize.decomposition import factors
from aicompress.methods.factorize.weighting.roots import Root
from aicompress.methods.factors import inner_metric, outer_metric, refit_inner, refit_outer, rotated_factors, triangle
from aicompress.methods.quantize.grid.row_feedback import rounded_by_rows
from aicompress.methods.quantize.rtn import METHOD as RTN
from aicompress.weights import Dense, LowRank, Weight
from tests.methods.layers import layer_of, randn

CONFIG = RTN.config(name="rtn", bits=4, group_size=16)  # type: ignore[call-arg]


def falling(rank: int = 32) -> LowRank:
    """Factors of a matrix (48, 64) whose singular values fall off."""
    matrix = randn(48, 48) @ torch.diag(torch.logspace(0, -2, 48)) @ randn(48, 64, seed=1)
    out, inner = factors(matrix, rank)
    return LowRank(Dense(out), Dense(inner))


def rounded(factor: Weight) -> Weight:
    return RTN.apply(layer_of(factor.dense()), CONFIG)


def gram() -> torch.Tensor:
    rows = randn(300, 64, seed=2) @ randn(64, 64, seed=3)
    return (rows.t() @ rows / 300).double()


def test_a_turned_product_is_the_same() -> None:
    weight = falling()
    again = rotated_factors(weight, seed=3)
    torch.testing.assert_close(again.dense(), weight.dense(), rtol=1e-4, atol=1e-4)
    assert torch.equal(rotated_factors(weight, seed=3).out.dense(), again.out.dense())
    half = rotated_factors(LowRank(Dense(weight.out.dense().half()), Dense(weight.inner.dense().half())), seed=3)
    assert half.specs()[""].dtype == torch.float16
    columns = again.out.dense().norm(dim=0)
    assert columns.max() / columns.min() < 3 < weight.out.dense().norm(dim=0)[0] / weight.out.dense().norm(dim=0)[-1]


def test_blocks_of_rows_have_the_triangle_of_all() -> None:
    """But for signs: RᵀR is XᵀX, also of fewer rows than columns."""
    for rows in (90, 5):
        matrix = randn(rows, 8).double()
        found = triangle(matrix.float().split(7))
        torch.testing.assert_close(found.t() @ found, matrix.t() @ matrix)
        assert not found.tril(-1).any()


def test_what_an_inner_factor_has_become_is_made_up_for() -> None:
    """U' V̂ is the nearest to U V of all U': no step away from it is nearer, and with V̂ = V nothing changes."""
    weight, hessian = falling(), gram()
    inner = rounded(weight.inner)
    better = refit_outer(weight, inner, hessian)
    plain, fitted = (loss(weight.dense() - each.out.dense() @ inner.dense(), hessian) for each in (weight, better))
    assert fitted < 0.8 * plain
    for seed in (5, 6):
        moved = better.out.dense() + 1e-2 * randn(48, 32, seed=seed)
        assert loss(weight.dense() - moved @ inner.dense(), hessian) > fitted
    torch.testing.assert_close(refit_outer(weight, weight.inner, hessian).dense(), weight.dense(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("known", [True, False])
def test_rounding_turned_and_fitted_factors_costs_less(known: bool) -> None:
    hessian = gram() if known else torch.eye(64, dtype=torch.float64)
    weight = falling()
    plain = LowRank(rounded(weight.out), rounded(weight.inner))
    start = rotated_factors(weight, seed=0)
    inner = rounded(start.inner)
    out = rounded(refit_outer(start, inner, hessian if known else None).out)
    errors = [loss(weight.dense() - each.dense(), hessian) for each in (plain, LowRank(out, inner))]
    assert errors[1] < 0.6 * errors[0]


def test_an_inner_factor_of_zeros_is_fitted_by_zeros() -> None:
    weight = falling()
    fitted = refit_outer(weight, Dense(torch.zeros(32, 64)), gram())
    assert torch.isfinite(fitted.out.dense()).all()
    assert not fitted.out.dense().any()


def test_an_inner_factor_answers_what_the_outer_one_has_become() -> None:
    """Û V' is the nearest to U V of all V', whatever the inputs; U turned as Û is gives what Û differs from it by."""
    weight, hessian = falling(), gram()
    outer = rounded(weight.out)
    near = refit_inner(weight, outer)
    inner = near.inner.dense()
    nearest = loss(weight.dense() - outer.dense() @ inner, hessian)
    assert nearest < 0.5 * loss(weight.dense() - outer.dense() @ weight.inner.dense(), hessian)
    for seed in (5, 6):
        moved = inner + 1e-2 * randn(32, 64, seed=seed)
        assert loss(weight.dense() - outer.dense() @ moved, hessian) > nearest
    lost = outer.dense() - near.out.dense()
    torch.testing.assert_close(weight.out.dense().t() @ lost, torch.zeros(32, 32), rtol=0, atol=1e-3)
    torch.testing.assert_close(refit_inner(weight, weight.out).dense(), weight.dense(), rtol=1e-3, atol=1e-3)
    none = refit_inner(weight, Dense(torch.zeros(48, 32)))
    assert not none.inner.dense().any()
    assert not none.out.dense().any()


def test_an_outer_factor_that_is_made_up_for_costs_less_to_round() -> None:
    """Beside an inner one that is rounded first and then made up for, on a matrix of unlike singular values."""
    draw = torch.linspace(0, 1.5, 128)
    matrix = randn(128, 128) @ torch.diag(10.0**-draw) @ randn(128, 128, seed=1)
    start = rotated_factors(LowRank(*map(Dense, factors(matrix, 48))), seed=0)
    inner = rounded(start.inner)
    first = LowRank(rounded(refit_outer(start, inner, None).out), inner)
    outer = rounded_by_rows(layer_of(start.out.dense()), outer_metric(start), RTN, CONFIG)
    last = LowRank(outer, rounded(refit_inner(start, outer).inner))
    errors = [float((each.dense() - start.dense()).square().sum()) for each in (first, last)]
    assert errors[1] < 0.85 * errors[0]


def test_errors_of_an_inner_factor_count_by_singular_values_of_stored_directions() -> None:
    """Where these are those of U V H^½, and shared evenly, P is UᵀU, which is Σ, turned as the outer factor is."""
    hessian = gram() + torch.eye(64)
    root = Root.of(hessian, 0.0)
    out, inner = factors(root.times(randn(48, 64).double()).float(), 32)
    weight = LowRank(Dense(out), Dense(root.undone(inner.double()).float()))
    rotation = torch.linalg.qr(randn(32, 32, seed=4).double()).Q
    outer = Dense((out.double() @ rotation).float())
    wanted = outer.dense().double().t() @ outer.dense().double()
    torch.testing.assert_close(inner_metric(weight, outer, hessian), wanted, rtol=1e-3, atol=1e-3 * float(wanted.max()))
    twice = LowRank(Dense(2 * out), Dense(weight.inner.dense() / 2))  # the same product counts the same
    same = Dense(outer.dense() * 2)
    torch.testing.assert_close(inner_metric(twice, same, hessian), wanted, rtol=1e-3, atol=1e-3 * float(wanted.max()))
    assert torch.equal(inner_metric(weight, outer, None), wanted)
    nothing = LowRank(Dense(torch.zeros(48, 32)), Dense(torch.zeros(32, 64)))
    assert not inner_metric(nothing, nothing.out, hessian).any()
