"""The search as a whole: measure, choose, refine, and write down why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from aicompress.checkpoint.journal import Journal
from aicompress.errors import RecipeError
from aicompress.methods.budget import Choice, least_cost
from aicompress.pipeline.layerwise.allocation.refine import Picks, Refined, Tables, refined
from aicompress.pipeline.layerwise.allocation.sensitivity import by_block, measured
from aicompress.pipeline.layerwise.allocation.target import meets, within
from aicompress.pipeline.layerwise.allocation.width_groups import costs, widths_of
from aicompress.pipeline.layerwise.allocation.width_trial import WidthTrial
from aicompress.pipeline.layerwise.plan import Plan
from aicompress.pipeline.step.checks import require_space
from aicompress.pipeline.step.options import Progress
from aicompress.pipeline.step.workers import Processes

EVALUATIONS = 16  # of the refinement, where the recipe gives no number
ROUNDS = 6  # of the search for the bound on summed losses that gives a bound on the measured one


def search(plan: Plan, journal: Journal | None, team: Processes, progress: Progress) -> tuple[Plan, dict[str, Any]]:
    """Find the widths of a plan's open layers; every process finds the same.

    Args:
        plan: with open layers.
        journal: the first process's notes of a run that was stopped, or fresh ones; None in the others.
        team: the processes.
        progress: told what is going on.

    Returns:
        The plan with explicit widths, and why it has them.

    Raises:
        RecipeError: the target cannot be met, or the calibration data does not fit the model.
        OutOfSpace: the chosen output does not fit the disk.
    """
    with WidthTrial.of(plan) as trial:
        if plan.search.max_kl is not None and not trial.probe.divergence:
            hint = "give target_bytes or target_bpw"
            raise RecipeError("max_kl needs a model that gives logits, and this one gives states", hint)
        losses = measured(trial, journal, team, progress)
        kept = team.gather(None if journal is None else journal.done.get(f"choice {plan.budget}".strip()))[0]
        if kept is not None:
            outcome = Refined(tuple(kept["picks"]), kept["before"], kept["after"], kept["evaluations"])
        else:
            outcome = (
                _bounded(trial, losses, progress) if plan.search.max_kl else _filled(trial, losses, team, progress)
            )
        if journal is not None and kept is None:
            journal.record(f"choice {plan.budget}".strip(), {**outcome.__dict__})
        final = plan.with_widths(widths_of(trial.units, outcome.picks))
        require_space(final.output)
        return final, _record(trial, losses, outcome)


def _filled(trial: WidthTrial, losses: Sequence[Sequence[float]], team: Processes, progress: Progress) -> Refined:
    """The best choice within a budget, refined."""
    plan = trial.plan
    choice, laid_out = within(plan, trial.units, losses)
    paid = costs(laid_out, trial.units)
    if plan.search.target_bpw is not None:
        budget = plan.search.target_bpw / 8 * sum(unit.weights for unit in trial.units)
    else:
        assert plan.search.target_bytes is not None
        budget = sum(row[pick] for row, pick in zip(paid, choice.picks, strict=True))
        budget += plan.search.target_bytes - laid_out.output.weight_bytes
    tables = Tables(paid, losses, budget)
    limit = EVALUATIONS if plan.search.evaluations is None else plan.search.evaluations
    progress("refinement", 0, limit)
    refinement = refined(tables, choice.picks, trial.loss, limit, team, plan.recipe.seed)
    widths = widths_of(trial.units, refinement.picks)
    if not meets(plan.with_widths(widths)):  # by its headers or its layout
        return replace(refinement, picks=choice.picks, after=refinement.before)
    return refinement


def _bounded(trial: WidthTrial, losses: Sequence[Sequence[float]], progress: Progress) -> Refined:
    """Least bytes whose measured divergence is within max_kl: the bound on the sum of losses is moved until it is.

    Raises:
        RecipeError: the largest widths exceed it.
    """
    assert trial.plan.search.max_kl is not None
    limit, paid = trial.plan.search.max_kl, costs(trial.plan, trial.units)
    best: Picks = tuple(len(row) - 1 for row in losses)
    least = trial.loss(best)
    if least > limit:
        raise RecipeError(
            f"max_kl {limit:g} is out of reach: the largest widths give {least:.3g}",
            f"give at least {least * 1.005:.3g}, wider choices, or smaller groups",
        )
    first, bound, tried, spent = least, limit, {best}, 1
    for turn in range(ROUNDS):
        progress("refinement", turn, ROUNDS)
        choice = _within_loss(paid, losses, bound)
        if choice.picks in tried:
            break
        tried.add(choice.picks)
        loss, spent = trial.loss(choice.picks), spent + 1
        if loss <= limit and choice.cost <= _cost(paid, best):
            best, least = choice.picks, loss
        bound = choice.loss * limit / loss * (1 if loss <= limit else 0.99) if loss else bound * 2
    return Refined(best, first, least, spent)


def _within_loss(paid: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], bound: float) -> Choice:
    """Least cost within a bound of the summed losses, or the least loss there is."""
    return least_cost(paid, losses, max(bound, sum(min(row) for row in losses) * (1 + 1e-9)))


def _cost(paid: Sequence[Sequence[float]], picks: Sequence[int]) -> float:
    return sum(row[pick] for row, pick in zip(paid, picks, strict=True))


def _record(trial: WidthTrial, losses: Sequence[Sequence[float]], outcome: Refined) -> dict[str, Any]:
    """For the report: what every unit got, and what each of its widths would have cost."""
    name, value = trial.plan.search.target
    paid = costs(trial.plan, trial.units)
    units = []
    for unit, row, spent, pick in zip(trial.units, losses, paid, outcome.picks, strict=True):
        options = [
            {"bits": width.bits, "group": width.group, "bytes": int(cost), "loss": loss}
            for width, cost, loss in zip(unit.widths, spent, row, strict=True)
        ]
        names = [layer.info.name for layer in unit.layers]
        chosen = unit.widths[pick]
        units.append({"layers": names, "bits": chosen.bits, "group": chosen.group, "options": options})
    return {
        "target": name,
        "value": value,
        "loss": "KL divergence of the outputs" if trial.probe.divergence else "relative squared error of the outputs",
        "measured": "blocks" if by_block(trial) else "outputs",
        "samples": sum(source.samples for source in trial.inputs.sources),
        "stand_in": bool(trial.plan.needs),
        "sum": _cost(losses, outcome.picks),
        "before": outcome.before,
        "after": outcome.after,
        "evaluations": outcome.evaluations,
        "units": units,
    }
