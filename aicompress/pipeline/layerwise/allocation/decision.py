"""A plan whose widths are decided: searched for where they are open, with notes that outlive a stopped run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aicompress.checkpoint.journal import Journal
from aicompress.checkpoint.place import working_path
from aicompress.disk import disk_errors
from aicompress.errors import RecipeError
from aicompress.pipeline.layerwise.allocation.search import search
from aicompress.pipeline.layerwise.allocation.target import meets, require_reach
from aicompress.pipeline.layerwise.plan import Plan, fingerprint_of
from aicompress.pipeline.step.layer_plan import named
from aicompress.pipeline.step.options import Progress
from aicompress.pipeline.step.workers import Processes

NAME = "bits.jsonl"


@dataclass(frozen=True)
class Decision:
    """A plan with explicit widths, and why it has them.

    Attributes:
        plan: to be run.
        record: for the report; empty where nothing was open.
        seconds: what the search took, and a survey before it.
        mark: fingerprint of the plan that was open.
        notes: of the search.
    """

    plan: Plan
    record: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    mark: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)

    def keep(self, work: Path) -> None:
        """Write the notes into a working directory that has just been emptied."""
        if self.notes and not (work / NAME).exists():
            journal = Journal.start(work, self.mark, NAME)
            for name, note in self.notes.items():
                journal.record(name, note)

    def forget(self, work: Path) -> None:
        """Take the notes away: the output is complete."""
        (work / NAME).unlink(missing_ok=True)


def decided(plan: Plan, resume: bool, team: Processes, progress: Progress) -> Decision:
    """Search for the widths that are open; the first process keeps notes beside the output.

    Raises:
        Refused: to go on with what another run left; the target cannot be met.
    """
    if not plan.searches:
        return Decision(plan)
    start = time.perf_counter()
    if team.rank != 0:
        return Decision(_searched(plan, None, team, progress)[0])
    mark = fingerprint_of(plan)
    with _notes(plan, mark, resume) as journal:
        final, record = _searched(plan, journal, team, progress)
        return Decision(final, record, time.perf_counter() - start, mark, dict(journal.done))


def _searched(plan: Plan, journal: Journal | None, team: Processes, progress: Progress) -> tuple[Plan, dict[str, Any]]:
    """Search for the widths of one budget after another, the recipe's last: it may be of the whole output."""
    records: list[dict[str, Any]] = []
    for budget in plan.searches:
        with named(budget):
            part = plan.sharing(budget)
            if records:
                require_reach(part)  # levels take more now than the least that they could
            final, record = search(part, journal, team, progress)
        records.append({**record, "level": budget} if budget else record)
        plan = replace(plan, layers=final.layers, output=final.output, warnings=final.warnings)
    *levels, last = records
    if not levels:
        return plan, last
    for budget in plan.searches:
        if not meets(plan.sharing(budget)):  # bytes depend on the layout, and that on all layers
            where = budget or "method"
            raise RecipeError(f"{where}: the layout of all layers together takes more than its budget", "give it more")
    units = [unit for record in records for unit in record["units"]]
    return plan, {**last, "units": units, "levels": [{**record, "units": []} for record in levels]}


@contextmanager
def _notes(plan: Plan, mark: str, resume: bool) -> Iterator[Journal]:
    """A journal in the output's working directory, which only an interrupt leaves behind."""
    work = working_path(plan.output.destination.path)
    parents = [parent for parent in work.parents if not parent.exists()]
    with disk_errors(plan.output.destination.path):
        work.mkdir(parents=True, exist_ok=True)
        journal = (Journal.resume if resume else Journal.start)(work, mark, NAME)
    try:
        yield journal
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt):
            shutil.rmtree(work, ignore_errors=True)
            for parent in parents:
                parent.rmdir()
        raise
