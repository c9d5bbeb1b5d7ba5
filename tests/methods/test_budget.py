"""The best options within a budget, against all of them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aicompress.methods import budget
from aicompress.methods.budget import Infeasible, least_cost, least_loss

Table = list[list[float]]


def test_hand_computed() -> None:
    """Two units; going from 2 to 3 saves 6 on the first and 5 on the second, and only one of them fits."""
    costs, losses = [[2, 3, 4], [2, 3, 4]], [[10, 4, 3], [9, 4, 0]]
    found = least_loss(costs, losses, 5)
    assert (found.picks, found.cost, found.loss) == ((1, 0), 5, 13)
    # The second unit's line from 2 to 4 saves 4.5 per unit of cost: the price at which the budget ends.
    assert found.price == 5
    assert least_loss(costs, losses, 7).picks == (1, 2)
    assert least_cost(costs, losses, 13).picks == (1, 0)


def test_an_option_inside_the_hull_is_taken_when_only_it_fits() -> None:
    """Cost 6 would be a corner; 5 is none, but with a budget of 5 the best there is."""
    costs, losses = [[0, 5, 6]], [[10, 9, 0]]
    assert least_loss(costs, losses, 5).picks == (1,)


def test_greedy_alone_would_be_wrong() -> None:
    """The step of the best price fills the knapsack and keeps two that together save more out of it."""
    costs, losses = [[0, 6], [0, 5], [0, 5]], [[7, 0], [5, 0], [5, 0]]
    assert least_loss(costs, losses, 10).picks == (0, 1, 1)


def test_dominated_options_are_never_taken() -> None:
    assert least_loss([[1, 2, 3, 4]], [[9, 6, 3, 3]], 4).picks == (2,)  # as good as the last, and cheaper
    assert least_loss([[2, 1, 1]], [[0, 5, 4]], 1).picks == (2,)
    assert least_loss([[1, 2]], [[1, 5]], 2).picks == (0,)  # dearer and worse


def test_a_budget_for_everything_costs_no_more_than_it_must() -> None:
    found = least_loss([[1, 2, 9], [1, 3, 4]], [[3, 1, 1], [3, 1, 0]], 1000)
    assert (found.picks, found.price) == ((1, 2), 0)


def test_equal_options_go_to_the_first() -> None:
    assert least_loss([[1, 1]], [[2, 2]], 1).picks == (0,)
    assert least_loss([], [], 0).picks == ()


def test_out_of_reach_says_what_is_in_reach() -> None:
    with pytest.raises(Infeasible) as error:
        least_loss([[3, 4], [5, 6]], [[1, 0], [1, 0]], 7)
    assert error.value.least == 8
    with pytest.raises(Infeasible) as error:
        least_cost([[3, 4], [5, 6]], [[1, 0.5], [1, 0.25]], 0.5)
    assert error.value.least == 0.75


@pytest.mark.parametrize(
    ("costs", "losses"), [([[1.0]], [[1.0, 2.0]]), ([[]], [[]]), ([[1.0]], [[float("nan")]]), ([[1.0]], [])]
)
def test_tables_that_make_no_sense(costs: Table, losses: Table) -> None:
    with pytest.raises(ValueError, match=r"option|finite"):
        least_loss(costs, losses, 10)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Table, Table, float]:
    """A few units of a few options, with ties, dominated options and budgets that nearly fit."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    number = st.integers(0, 12) | st.integers(0, 1000)
    costs = [[float(draw(number)) for _ in range(size)] for size in sizes]
    losses = [[float(draw(number)) for _ in range(size)] for size in sizes]
    return costs, losses, float(draw(st.integers(0, int(sum(max(row) for row in costs)))))


def brute_force(costs: Table, losses: Table, budget: float) -> float | None:
    """Least loss over every combination."""
    best = None
    for picks in itertools.product(*(range(len(row)) for row in costs)):
        if sum(row[pick] for row, pick in zip(costs, picks, strict=True)) <= budget:
            loss = sum(row[pick] for row, pick in zip(losses, picks, strict=True))
            best = loss if best is None else min(best, loss)
    return best


@given(problems())
@settings(max_examples=100, deadline=None)
def test_as_good_as_brute_force(problem: tuple[Table, Table, float]) -> None:
    costs, losses, limit = problem
    best = brute_force(costs, losses, limit)
    if best is None:
        with pytest.raises(Infeasible) as error:
            least_loss(costs, losses, limit)
        assert error.value.least == sum(min(row) for row in costs)
        return
    found = least_loss(costs, losses, limit)
    assert found.loss == best
    assert found.cost <= limit
    assert found.loss == sum(row[pick] for row, pick in zip(losses, found.picks, strict=True))
    swapped = least_cost(losses, costs, limit)  # the same problem with the two exchanged
    assert (swapped.cost, swapped.loss <= limit) == (best, True)


def test_more_states_than_are_kept_still_give_a_good_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for few states the choice fits, and is at most one step of one unit from the best."""
    costs = [[0.0, 101.0 + 7 * n, 211.0 + 3 * n] for n in range(12)]
    losses = [[50.0 + n, 20.0 - n, 3.0] for n in range(12)]
    exact = least_loss(costs, losses, 1300)
    monkeypatch.setattr(budget, "STATES", 2)
    found = least_loss(costs, losses, 1300)
    assert found.cost <= 1300
    assert exact.loss < found.loss <= exact.loss + max(row[0] - row[-1] for row in losses)


def test_a_thousand_units() -> None:
    """Real sizes: within the budget, and within the last step of the bound that the relaxation gives."""
    widths = [2, 3, 4, 8]
    costs = [[float(bits * (4096 + 64 * (n % 7))) for bits in widths] for n in range(1000)]
    losses = [[(1 + n % 13) * 4.0**-bits for bits in widths] for n in range(1000)]
    budget_ = 0.42 * sum(row[-1] for row in costs)
    found = least_loss(costs, losses, budget_)
    bound = sum(
        min(loss + found.price * cost for loss, cost in zip(row, paid, strict=True))
        for row, paid in zip(losses, costs, strict=True)
    )
    assert found.cost <= budget_
    assert found.loss - (bound - found.price * budget_) <= 1e-4 * found.loss
    assert found == least_loss(costs, losses, budget_)
