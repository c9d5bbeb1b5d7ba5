"""Run `distill` and print its report."""

from __future__ import annotations

from pathlib import Path

from aicompress.cli.boundary import STARTED
from aicompress.cli.progress import reporter
from aicompress.cli.step import Flags, adapted, conclude, destination


def run(
    source: tuple[str, list[str]],
    teacher: tuple[list[str], Path | None],
    out: Path,
    recipe: tuple[str, list[str]],
    flags: Flags,
    where: tuple[str, Path | None],
) -> None:
    """Plan a distillation and print the plan, or run it and print its report.

    Args:
        source: IN with its adapters.
        teacher: what to learn from, and the folder of stored outputs.
        out: OUT.
        recipe: its name, and what is set in it.
        flags: as given.
        where: the device, and the folder of the log.
    """
    from aicompress.pipeline.distillation import run as distillation
    from aicompress.pipeline.distillation.plan import make_plan
    from aicompress.pipeline.distillation.pruned_student import Teaching, pruned_student
    from aicompress.pipeline.distillation.students.made_student import made_student
    from aicompress.pipeline.step.options import Options
    from aicompress.pipeline.step.workers import is_first
    from aicompress.recipe.distillation import load

    loaded = load(recipe[0], recipe[1])
    given, place = adapted(*source), destination(out, flags)
    of_itself = (loaded.student is not None and loaded.mean_teacher is None) or loaded.iterate is not None
    progress = reporter(flags.quiet or not is_first())
    teachers, cache = teacher
    learned_from = teachers or ([given] if of_itself else [])
    device, log_folder = where
    options = Options(flags.resume, flags.latency, progress, device, STARTED)
    teaching = Teaching(learned_from, flags.allow_code, cache, log_folder)
    with (
        made_student(given, place, loaded, progress, plan_only=flags.dry_run) as made,
        pruned_student(given, place, loaded, teaching, options, plan_only=flags.dry_run) as pruned,
    ):
        planned = make_plan(pruned or made or given, learned_from, place, loaded, flags.allow_code, cache)
        own = distillation.TrainingOptions(movement_file=flags.stats[0] if flags.stats else None, log_folder=log_folder)
        conclude(planned, flags, lambda: distillation.run(planned, options, own))
