"""Prune a student and train it back in turn, a little further in each round; the last training is the caller's."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from aicompress.checkpoint.place import working_path
from aicompress.disk import require_writable
from aicompress.errors import raise_all
from aicompress.pipeline.distillation import run as distillation
from aicompress.pipeline.distillation.made_student import MadeStudent, kept_folder
from aicompress.pipeline.distillation.plan import make_plan
from aicompress.pipeline.layerwise import planner, run
from aicompress.pipeline.step.checks import NOT_OF_TRAINING, place_problems
from aicompress.pipeline.step.input import Adapted, open_input
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.step.workers import is_first
from aicompress.recipe.distillation import DistillRecipe

Source = str | Path | Adapted


@dataclass(frozen=True)
class Teaching:
    """What every round learns from.

    Attributes:
        teachers: checkpoints; IN where none is given.
        allow_code: a factory that the recipe names may run.
        cache: folder of stored outputs.
    """

    teachers: Sequence[Source]
    allow_code: bool = False
    cache: Path | None = None


@contextmanager
def pruned_student(
    source: Source,
    destination: Destination,
    recipe: DistillRecipe,
    teaching: Teaching,
    options: Options = Options(),
    plan_only: bool = False,
) -> Iterator[MadeStudent | None]:
    """Carry out all rounds of a recipe but for the last training, and remove them when the context ends.

    They lie beside the output, and are steps of prune and distill with their places in the lineage. A stopped run that
    is resumed makes them anew, to the same bytes.

    Args:
        source: the checkpoint.
        destination: where the student goes in the end.
        recipe: its `iterate` section says what rounds there are; without one there are none.
        teaching: what every round learns from.
        options: of the run.
        plan_only: nobody trains: the student is pruned at once as far as in the end.

    Raises:
        CompressError: a round cannot be done.
    """
    if recipe.iterate is None:
        yield None
        return
    origin, _ = open_input(source)
    raise_all(place_problems([origin], destination, recipe.gates, NOT_OF_TRAINING))
    require_writable(destination.path)
    work = working_path(destination.path)
    folder = work.with_name(work.name.removesuffix("-partial") + ("-rounds-plan" if plan_only else "-rounds"))
    ending = ".safetensors" if origin.source.folder is None else ""
    alone = recipe.model_copy(update={"iterate": None, "gates": ()})
    silent = Options(latency="off", progress=options.progress, device=options.device)
    with kept_folder(folder):
        steps = recipe.iterate.steps(recipe.data, recipe.seed)
        place: Source = source
        told: list[str] = []
        warnings: list[str] = []
        for number, step in enumerate(steps[-1:] if plan_only else steps):
            pruned, trained = (folder / f"{number}-{what}{ending}" for what in ("pruned", "trained"))
            plan = planner.make_plan(place, Destination(pruned, overwrite=True), step, "prune")
            warnings += run.run(plan, silent).warnings
            if plan_only or number == len(steps) - 1:
                yield MadeStudent(pruned, origin, tuple(told), tuple(dict.fromkeys(warnings)))
                return
            again = make_plan(
                pruned,
                teaching.teachers,
                Destination(trained, overwrite=True),
                alone,
                teaching.allow_code,
                teaching.cache,
            )
            training = distillation.run(again, silent).training
            losses = f"{training['held_out_before']:.4g} → {training['held_out_after']:.4g}"
            told.append(f"round {number + 1}: sparsity {recipe.iterate.sparsity[number]:g}, held-out loss {losses}")
            if is_first():
                shutil.rmtree(pruned) if pruned.is_dir() else pruned.unlink()
            place = trained
