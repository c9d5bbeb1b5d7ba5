"""The choice refined on the model itself: losses do not quite add up, and a few trials find what sums do not see.

Evolutionary search as in EvoPress (Sieberling et al. 2024, arXiv:2410.14649): a child has one unit, or two, some widths
up and others down until the budget holds again. Of many children those that the sensitivities like best are tried; the
best of a generation replaces its parent if its measured loss is clearly smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from aicompress.pipeline.step.workers import Processes

CHILDREN = 8  # that are tried in a generation
DRAWN = 64  # that are drawn for them
MARGIN = 0.02  # by which a child must be better: less is the noise of the samples
WIDE = 4  # widths of a unit for each that it may rise at once: with several groups to a number of bits one is little
PATIENCE = 3  # generations without a better child before the search ends

Picks = tuple[int, ...]


@dataclass(frozen=True)
class Refined:
    """What the search found.

    Attributes:
        picks: the width of every unit.
        before, after: measured losses of the first choice and of this one; None where nothing was tried.
        evaluations: runs of the model.
    """

    picks: Picks
    before: float | None
    after: float | None
    evaluations: int


@dataclass(frozen=True)
class Tables:
    """Costs and losses of every unit at each of its widths, and what all may cost together."""

    costs: Sequence[Sequence[float]]
    losses: Sequence[Sequence[float]]
    budget: float

    def cost(self, picks: Sequence[int]) -> float:
        return sum(row[pick] for row, pick in zip(self.costs, picks, strict=True))

    def loss(self, picks: Sequence[int]) -> float:
        return sum(row[pick] for row, pick in zip(self.losses, picks, strict=True))


def refined(
    tables: Tables, start: Picks, measure: Callable[[Picks], float], evaluations: int, team: Processes, seed: int
) -> Refined:
    """Search from a choice on; deterministic, and the same for any number of processes.

    Args:
        tables: what the choice was made from.
        start: the choice.
        measure: picks -> loss; the processes share the calls.
        evaluations: calls at most, the one of the start included.
        team: the processes.
        seed: of the draws.
    """
    if not evaluations:
        return Refined(start, None, None, 0)
    generator = torch.Generator().manual_seed(seed)
    first = measure(start)
    best, least, spent, idle = start, first, 1, 0
    seen = {start}
    while spent < evaluations and idle < PATIENCE:
        wanted = min(CHILDREN, evaluations - spent)
        children = _children(tables, best, seen, wanted, generator)
        if not children:
            break
        seen.update(children)
        mine = [measure(child) for child in children[team.rank :: team.size]]
        gathered = team.gather(mine)
        losses = [gathered[at % team.size][at // team.size] for at in range(len(children))]
        spent += len(children)
        at = min(range(len(losses)), key=losses.__getitem__)
        idle += 1
        if losses[at] < (1 - MARGIN) * least:
            best, least, idle = children[at], losses[at], 0
    return Refined(best, first, least, spent)


def _children(tables: Tables, parent: Picks, seen: set[Picks], wanted: int, generator: torch.Generator) -> list[Picks]:
    """The most promising of the children drawn."""
    drawn = {child for _ in range(DRAWN) if (child := _child(tables, parent, generator)) is not None}
    return sorted(drawn - seen, key=lambda child: (tables.loss(child), child))[:wanted]


def _child(tables: Tables, parent: Picks, generator: torch.Generator) -> Picks | None:
    """One or two units up, others a width down until the budget holds; None where it does not work out."""
    picks = list(parent)
    order = torch.randperm(len(picks), generator=generator).tolist()
    rises = 1 + int(torch.randint(2, (), generator=generator))
    raised = [unit for unit in order if picks[unit] + 1 < len(tables.costs[unit])][:rises]
    for unit in raised:
        most = len(tables.costs[unit]) - 1
        reach = max(1, len(tables.costs[unit]) // WIDE)
        picks[unit] = min(most, picks[unit] + 1 + int(torch.randint(reach, (), generator=generator)))
    over = tables.cost(picks) - tables.budget
    for unit in reversed(order):
        if over <= 0:
            break
        if unit not in raised and picks[unit]:
            over -= tables.costs[unit][picks[unit]] - tables.costs[unit][picks[unit] - 1]
            picks[unit] -= 1
    return tuple(picks) if raised and over <= 0 else None
