"""Make the student of a distillation before training: by structural steps, or of a configuration of its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.place import lock, working_path
from aicompress.disk import empty, require_writable
from aicompress.errors import RecipeError, Refused, raise_all
from aicompress.pipeline.distillation.students.configured_student import make
from aicompress.pipeline.step.checks import NOT_OF_TRAINING, place_problems
from aicompress.pipeline.step.input import Adapted, open_input
from aicompress.pipeline.step.options import Options, Progress
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.step.workers import is_first
from aicompress.pipeline.structured import planner, run
from aicompress.pipeline.structured.plan import StructurePlan
from aicompress.recipe import Recipe
from aicompress.recipe.distillation import DistillRecipe
from aicompress.report.model import Report


@dataclass(frozen=True)
class MadeStudent:
    """A student that was made of a checkpoint.

    Attributes:
        path: where it lies until the distillation is over.
        origin: the checkpoint that it was made of.
        told: what was cut or drawn, for plan and report.
        warnings: what the user should know of the cuts.
    """

    path: Path
    origin: Checkpoint
    told: tuple[str, ...]
    warnings: tuple[str, ...]


@contextmanager
def made_student(
    source: str | Path | Adapted,
    destination: Destination,
    recipe: DistillRecipe,
    progress: Progress = lambda what, done, total: None,
    plan_only: bool = False,
) -> Iterator[MadeStudent | None]:
    """Make the student that a recipe asks for of a checkpoint, and remove it when the context ends.

    It lies beside the output. Every cut is a step of prune with its place in the student's lineage, so that the same
    steps by hand give the same student. A stopped distillation that is resumed makes it anew, to the same bytes.

    Args:
        source: the checkpoint.
        destination: where the trained student goes.
        recipe: its `student` section says what stays; without one there is no student to make.
        progress: told of every cut.
        plan_only: nobody trains it; a run that is training may have one of its own at the same time.

    Raises:
        Refused: or Problems: OUT is taken, or the checkpoint cannot be cut so.
    """
    if recipe.student is None:
        yield None
        return
    origin, _ = open_input(source)
    if origin.config is None:
        hint = "prune it first, by channels for one, and give what comes out as IN with --teacher"
        raise Refused(f"{origin.path} names no architecture: no student can be cut out of it", hint)
    raise_all(place_problems([origin], destination, recipe.gates, NOT_OF_TRAINING))
    require_writable(destination.path)
    work = working_path(destination.path)
    folder = work.with_name(work.name.removesuffix("-partial") + ("-student-plan" if plan_only else "-student"))
    with kept_folder(folder):
        if recipe.student.config is not None:
            path, said = make(origin, folder, recipe, Path(recipe.student.config), progress)
            yield MadeStudent(path, origin, (said,), ())
            return
        told: list[str] = []
        warnings: list[str] = []
        place = source
        for number, cut in enumerate(recipe.student.cuts(recipe.data, recipe.seed)):
            made = folder / f"{number}-{cut.method.name}"
            plan, report = _cut(place, made, cut, progress)
            told += _told(plan)
            warnings += report.warnings
            if is_first() and number:
                shutil.rmtree(place)  # type: ignore[arg-type]
            place = made
        yield MadeStudent(Path(place), origin, tuple(told), tuple(dict.fromkeys(warnings)))  # type: ignore[arg-type]


@contextmanager
def kept_folder(folder: Path, resumes: bool | None = None) -> Iterator[None]:
    """A folder of this run alone, which is removed when the context ends.

    Args:
        folder: where.
        resumes: what is in it stays where the run is interrupted, and is there (True) or not (False) for the next one;
            None where every run starts anew.

    Raises:
        Refused: another run uses it.
    """
    if not is_first():
        yield
        return
    made = [parent for parent in folder.parents if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    held, kept = lock(folder), False
    if not resumes:
        empty(folder)
    try:
        yield
    except KeyboardInterrupt:
        kept = resumes is not None
        raise
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
        os.close(held)
        for parent in made:
            with suppress(OSError):  # the output lies there
                parent.rmdir()


def _cut(source: str | Path | Adapted, made: Path, cut: Recipe, progress: Progress) -> tuple[StructurePlan, Report]:
    """Run one structural step.

    Raises:
        CompressError: it cannot be done.
    """
    try:
        plan = planner.make_plan(source, Destination(made, overwrite=True), cut, "prune")
    except RecipeError as error:
        raise RecipeError(f"student: {error.message}", error.hint) from error
    return plan, run.run(plan, Options(latency="off", progress=progress))


def _told(plan: StructurePlan) -> list[str]:
    """What a cut leaves: which blocks went, or how many units of each layer stay."""
    edit, units = plan.edit, plan.pruner.unit.plural
    sizes = [f"{size} of {whole.size}" for whole, size in zip(edit.structures, edit.sizes, strict=True)]
    return [f"student: {note}" for note in edit.notes] or [f"student: {units} {', '.join(dict.fromkeys(sizes))}"]
