"""One option for every unit, of least total loss within a budget: the multiple-choice knapsack problem.

A unit is what is decided at once (a layer, or layers that must agree) and an option a way to compress it (a width, a
sparsity) with its cost (bytes, milliseconds) and its loss. Three steps (Kellerer, Pferschy & Pisinger 2004, Knapsack
Problems, chapter 11):

1. The linear relaxation. On each unit's lower convex hull of (cost, loss) every step up has a price, the loss it saves
   per unit of cost; the steps of all units are taken in the order of their prices while the budget lasts. The price of
   the first step that does not fit is the Lagrangian multiplier mu that bisection would find.
2. A greedy fill with later steps that still fit: a solution, at most one step of one unit from the optimum.
3. What is left, exactly: an option whose gap, (loss + mu cost) above its unit's least, exceeds the distance between
   that solution and the bound of the relaxation is in no better one. Dynamic programming over the others keeps the
   states that no other dominates. Past STATES of them those of least gap survive: then, and only then, it is inexact.

Cost and loss play the same part: the least cost of a bounded loss is the same problem with the two exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STATES = 1 << 14
SLACK = 1e-12  # relative: sums of the same numbers in another order

Floats = NDArray[np.float64]
Integers = NDArray[np.intp]
Table = Sequence[Sequence[float]]


class Infeasible(ValueError):
    """Not even the least options fit.

    Attributes:
        least: the smallest limit that can be met.
    """

    def __init__(self, least: float) -> None:
        super().__init__(f"the least total is {least:g}")
        self.least = least


@dataclass(frozen=True)
class Choice:
    """An option for every unit.

    Attributes:
        picks: number of the option, by unit.
        cost, loss: totals.
        price: mu, what one more unit of cost would save of the loss (of the relaxation); 0 where nothing is to be
            gained any more.
    """

    picks: tuple[int, ...]
    cost: float
    loss: float
    price: float


def least_loss(costs: Table, losses: Table, budget: float) -> Choice:
    """The choice of least total loss among those whose total cost is within the budget.

    Deterministic. Among options of equal cost and loss the first is taken.

    Args:
        costs: of every option of every unit; units may have different numbers of options.
        losses: as many.
        budget: total cost that is not exceeded.

    Raises:
        Infeasible: the cheapest options cost more.
        ValueError: a unit has no option, the tables differ in shape, or a number is not finite.
    """
    picks, price = _choose(_table(costs, losses), _table(losses, costs), budget)
    return Choice(picks, _total(costs, picks), _total(losses, picks), price)


def least_cost(costs: Table, losses: Table, bound: float) -> Choice:
    """The choice of least total cost among those whose total loss is within a bound; see `least_loss`.

    Raises:
        Infeasible: the options of least loss lose more.
        ValueError: a unit has no option, the tables differ in shape, or a number is not finite.
    """
    picks, price = _choose(_table(losses, costs), _table(costs, losses), bound)
    return Choice(picks, _total(costs, picks), _total(losses, picks), 1 / price if price else 0.0)


def _total(table: Table, picks: Sequence[int]) -> float:
    return sum(row[pick] for row, pick in zip(table, picks, strict=True))


def _table(rows: Table, like: Table) -> Floats:
    """(units, options), missing options at infinity."""
    if [len(row) for row in rows] != [len(row) for row in like]:
        raise ValueError("every option needs a cost and a loss")
    if not all(len(row) for row in rows):
        raise ValueError("a unit has no option")
    table = np.full((len(rows), max((len(row) for row in rows), default=1)), np.inf)
    for unit, row in enumerate(rows):
        table[unit, : len(row)] = row
        if not np.isfinite(table[unit, : len(row)]).all():
            raise ValueError(f"unit {unit} has a cost or loss that is not finite")
    return table


@dataclass(frozen=True)
class _Steps:
    """Steps up all units' hulls: from the option before to the next, in order within each unit.

    Attributes:
        unit, option: whose step, and where it leads, (steps,).
        cost: what it costs more.
        price: what it saves per cost.
    """

    unit: Integers
    option: Integers
    cost: Floats
    price: Floats


def _cheapest(costs: Floats, losses: Floats) -> Integers:
    """The option of least cost, of least loss among those, of every unit."""
    cheap = costs == costs.min(axis=1, keepdims=True)
    least: Integers = np.where(cheap, losses, np.inf).argmin(axis=1)
    return least


def _steps(costs: Floats, losses: Floats) -> _Steps:
    """Walk up the hulls of all units at once (gift wrapping): always to the option that saves most per cost."""
    everyone = np.arange(len(costs))
    here = _cheapest(costs, losses)
    rises: list[tuple[Integers, Integers, Floats, Floats]] = []
    while True:
        dearer = costs - costs[everyone, here][:, None]
        with np.errstate(invalid="ignore"):
            saved = losses[everyone, here][:, None] - losses
        ahead = (dearer > 0) & np.isfinite(dearer) & (saved > 0)
        price = np.where(ahead, saved / np.where(ahead, dearer, 1.0), 0.0)
        best = price.max(axis=1, initial=0.0)
        # Of several on one line the farthest: the points between are not corners.
        there = np.where(ahead & (price >= best[:, None]), dearer, -1.0).argmax(axis=1)
        goes = np.flatnonzero(best > 0)
        if not len(goes):
            break
        rises.append((goes, there[goes], dearer[goes, there[goes]], best[goes]))
        here = np.where(best > 0, there, here)
    if not rises:
        return _Steps(np.empty(0, np.intp), np.empty(0, np.intp), np.empty(0), np.empty(0))
    return _Steps(*(np.concatenate(column) for column in zip(*rises, strict=True)))


def _choose(costs: Floats, losses: Floats, budget: float) -> tuple[tuple[int, ...], float]:
    """Picks and mu."""
    everyone = np.arange(len(costs))
    picks = _cheapest(costs, losses)
    least = float(costs[everyone, picks].sum())
    if least > budget:
        raise Infeasible(least)
    picks, left, price = _spend(picks, _steps(costs, losses), budget - least)
    if price == 0:  # nothing is left that saves anything
        return tuple(picks.tolist()), price
    picks = _fill(costs, losses, picks, left)
    better = _exact(costs, losses, picks, price, budget)
    return tuple((picks if better is None else better).tolist()), price


def _spend(picks: Integers, steps: _Steps, left: float) -> tuple[Integers, float, float]:
    """Take steps by falling price while they fit; later ones of other units may still fit.

    Returns:
        Picks, what is left of the budget, and mu: the price of the first step that did not fit.
    """
    picks, price = picks.copy(), 0.0
    stopped = np.zeros(len(picks), dtype=bool)
    # A unit's own steps come with falling prices; the stable sort keeps their order where prices are equal.
    for step in np.argsort(-steps.price, kind="stable"):
        unit = steps.unit[step]
        if stopped[unit]:
            continue
        if steps.cost[step] > left:
            stopped[unit] = True
            price = price or float(steps.price[step])
            continue
        picks[unit] = steps.option[step]
        left -= float(steps.cost[step])
    return picks, left, price


def _fill(costs: Floats, losses: Floats, picks: Integers, left: float) -> Integers:
    """Spend what is left on single changes, options inside the hulls included, the one that saves most first."""
    everyone = np.arange(len(costs))
    while True:
        dearer = costs - costs[everyone, picks][:, None]
        saved = np.where(dearer <= left, losses[everyone, picks][:, None] - losses, 0.0)
        unit, option = divmod(int(saved.argmax()), saved.shape[1])
        if saved[unit, option] <= 0:
            return picks
        left -= float(dearer[unit, option])
        picks[unit] = option


def _exact(costs: Floats, losses: Floats, picks: Integers, price: float, budget: float) -> Integers | None:
    """A choice better than `picks`, the best there is unless STATES are not enough; None where there is none."""
    everyone = np.arange(len(costs))
    total = losses + price * costs
    gaps = total - total.min(axis=1, keepdims=True)
    bound = float(total.min(axis=1).sum()) - price * budget
    held = float(losses[everyone, picks].sum())
    room = held - bound
    if room <= SLACK * (abs(held) + abs(price * budget)):
        return None
    rest = np.append(np.cumsum(costs.min(axis=1)[::-1])[::-1][1:], 0.0)  # least cost of the units after this one
    cost, loss, gap = np.zeros(1), np.zeros(1), np.zeros(1)
    trail: list[tuple[Integers, Integers]] = []
    for unit in everyone:
        options = np.flatnonzero(gaps[unit] <= room)
        grown = [(a[:, None] + b[unit, options]).ravel() for a, b in ((cost, costs), (loss, losses), (gap, gaps))]
        alive = np.flatnonzero((grown[0] + rest[unit] <= budget) & (grown[2] <= room))
        alive = alive[_undominated(grown[0][alive], grown[1][alive])]
        if len(alive) > STATES:
            alive = np.sort(alive[np.argsort(grown[2][alive], kind="stable")[:STATES]])
        if not len(alive):
            return None
        cost, loss, gap = (values[alive] for values in grown)
        trail.append((alive // len(options), options[alive % len(options)]))
    best = int(loss.argmin())
    if loss[best] >= held:
        return None
    exact = np.empty(len(costs), dtype=np.intp)
    for unit in everyone[::-1]:
        parents, options = trail[unit]
        exact[unit], best = options[best], int(parents[best])
    return exact


def _undominated(cost: Floats, loss: Floats) -> Integers:
    """States for which no other is as cheap and loses as little."""
    order = np.lexsort((loss, cost))
    ordered = loss[order]
    before = np.concatenate([[np.inf], np.minimum.accumulate(ordered)[:-1]]) if len(ordered) else ordered
    return order[ordered < before]
