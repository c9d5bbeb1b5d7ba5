"""The target of a search: whether it can be reached, what a plan shows of it, and the best choice within it."""

from __future__ import annotations

from collections.abc import Sequence

from aicompress.errors import RecipeError
from aicompress.methods.budget import Choice, Infeasible, least_loss
from aicompress.pipeline.layerwise.allocation.width_groups import WidthGroup, bits_per_weight, costs, widths_of
from aicompress.pipeline.layerwise.plan import Plan
from aicompress.report.plan import Undecided

TRIES = 12  # layouts in search of one that fills the target


def extreme(plan: Plan, end: int) -> Plan:
    """The plan with the least widths (end 0) or with the largest (end -1)."""
    return plan.with_widths({name: widths[end] for name, widths in plan.open.items()})


def require_reach(plan: Plan) -> None:
    """Refuse a target that the least widths miss.

    Raises:
        RecipeError: with the smallest one that can be met.
    """
    size, bpw = plan.search.target_bytes, plan.search.target_bpw
    smallest = extreme(plan, 0)
    if size is not None and smallest.output.weight_bytes > size:
        least = smallest.output.weight_bytes
        raise RecipeError(
            f"target_bytes {size:,} is out of reach: the least widths take {least:,}",
            f"give at least {least}, select more layers, or larger groups",
        )
    if bpw is not None and (least_bpw := bits_per_weight(smallest)) > bpw:
        raise RecipeError(
            f"target_bpw {bpw:g} is out of reach: the least widths take {_upwards(least_bpw)} with their scales",
            f"give at least {_upwards(least_bpw)}, or larger groups",
        )


def meets(plan: Plan) -> bool:
    """Whether a plan that is laid out keeps its target_bytes or target_bpw."""
    size, bpw = plan.search.target_bytes, plan.search.target_bpw
    return (size is None or plan.output.weight_bytes <= size) and (bpw is None or bits_per_weight(plan) <= bpw)


def _upwards(value: float) -> str:
    """Three decimals, rounded up, so that what is said to be enough is enough."""
    return f"{-(-value * 1000 // 1) / 1000:g}"


def undecided(plan: Plan) -> Undecided:
    """What a dry run says of a search: its target, and the bytes between which its choice lies."""
    *levels, (_, search) = plan.searches.items()
    name, value = search.target
    limit = extreme(plan, -1).output.weight_bytes
    if search.target_bytes is not None:
        limit = min(limit, search.target_bytes)
    others = tuple(f"{budget}: {other.target[0]} {other.target[1]:g}" for budget, other in levels)
    return Undecided(name, value, len(plan.open), extreme(plan, 0).output.weight_bytes, limit, others)


def within(plan: Plan, units: Sequence[WidthGroup], losses: Sequence[Sequence[float]]) -> tuple[Choice, Plan]:
    """The choice of least total loss within target_bytes or target_bpw, laid out.

    Bytes of headers and the layout of the tensors depend on the choice: the budget, or the costs, are taken from what
    is laid out until that fills the target as far as it can; it never exceeds it.
    """
    if plan.search.target_bpw is not None:
        return _narrow(plan, units, losses, plan.search.target_bpw)
    size = plan.search.target_bytes
    assert size is not None
    return _filled(plan, units, losses, size)


def _narrow(
    plan: Plan, units: Sequence[WidthGroup], losses: Sequence[Sequence[float]], bpw: float
) -> tuple[Choice, Plan]:
    draft, budget = plan, bpw / 8 * sum(unit.weights for unit in units)
    for _ in range(TRIES):
        try:
            choice = least_loss(costs(draft, units), losses, budget)
        except Infeasible:
            break
        draft = plan.with_widths(widths_of(units, choice.picks))
        if bits_per_weight(draft) <= bpw:
            return choice, draft
    return _least(plan, units, losses)


def _filled(
    plan: Plan, units: Sequence[WidthGroup], losses: Sequence[Sequence[float]], size: int
) -> tuple[Choice, Plan]:
    draft = plan
    paid = costs(draft, units)
    outside = draft.output.weight_bytes - sum(row[0] for row in paid)  # everything that no unit pays for
    best: tuple[Choice, Plan] | None = None
    for _ in range(TRIES):
        try:
            choice = least_loss(paid, losses, size - outside)
        except Infeasible:
            break
        draft = plan.with_widths(widths_of(units, choice.picks))
        spent = draft.output.weight_bytes
        if spent > size:
            outside += spent - size
            if best is not None:
                break
            continue
        if best is None or choice.loss < best[0].loss:
            best = choice, draft
        if (rest := spent - choice.cost) >= outside:
            break
        outside = rest
    return best or _least(plan, units, losses)


def _least(plan: Plan, units: Sequence[WidthGroup], losses: Sequence[Sequence[float]]) -> tuple[Choice, Plan]:
    """The least widths, which `require_reach` has seen to fit."""
    paid = costs(plan, units)
    only = least_loss([row[:1] for row in paid], [row[:1] for row in losses], sum(row[0] for row in paid))
    return only, extreme(plan, 0)
