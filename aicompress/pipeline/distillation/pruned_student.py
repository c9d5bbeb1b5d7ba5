"""Prune a student and train it back in turn, a little further in each round; the last training is the caller's.

A journal notes every step that is complete, so that a run that goes on does none of them twice.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.journal import Journal, require_same
from aicompress.checkpoint.place import working_path
from aicompress.disk import require_writable
from aicompress.errors import raise_all
from aicompress.model.distillation.outputs import runner
from aicompress.pipeline.distillation import run as distillation
from aicompress.pipeline.distillation.data.samples import fitting_samples, models
from aicompress.pipeline.distillation.made_student import MadeStudent, kept_folder
from aicompress.pipeline.distillation.plan import make_plan, resolved_precision
from aicompress.pipeline.layerwise import planner, run
from aicompress.pipeline.step.checks import NOT_OF_TRAINING, place_problems
from aicompress.pipeline.step.digests import fingerprint
from aicompress.pipeline.step.input import Adapted, open_input
from aicompress.pipeline.step.models.running_model import resolved_device
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.step.run import assembled
from aicompress.pipeline.step.workers import is_first
from aicompress.recipe import Recipe
from aicompress.recipe.distillation import DistillRecipe

Source = str | Path | Adapted
JOURNAL = "rounds.jsonl"


@dataclass(frozen=True)
class Teaching:
    """What every round learns from.

    Attributes:
        teachers: checkpoints; IN where none is given.
        allow_code: a factory that the recipe names may run.
        cache: folder of stored outputs.
        log_folder: where to log the numbers of every step, each round but the last in a folder of its own there.
    """

    teachers: Sequence[Source]
    allow_code: bool = False
    cache: Path | None = None
    log_folder: Path | None = None


@dataclass(frozen=True)
class _Steps:
    """The steps of all rounds, each of which is done once.

    Attributes:
        folder: where their outputs lie.
        ending: of an output's name.
        journal: the steps that are done, by the names of their outputs.
        options: of every step.
    """

    folder: Path
    ending: str
    journal: Journal
    options: Options

    def prune(self, number: int, place: Source, step: Recipe) -> tuple[Path, list[str]]:
        """Prune further; the output, which is gone once it has been trained, and warnings."""
        out = self.folder / f"{number}-pruned{self.ending}"
        if out.name not in self.journal.done:
            plan = planner.make_plan(place, Destination(out, overwrite=True), step, "prune")
            self._note(out, list(run.run(plan, self.options).warnings))
        return out, self.journal.done[out.name]

    def train(self, number: int, pruned: Path, recipe: DistillRecipe, teaching: Teaching) -> tuple[Path, str]:
        """Train what has been pruned; the output, and its held-out loss before and after, in words."""
        out = self.folder / f"{number}-trained{self.ending}"
        if out.name not in self.journal.done:
            goes = Destination(out, overwrite=True)
            plan = make_plan(pruned, teaching.teachers, goes, recipe, teaching.allow_code, teaching.cache)
            log = teaching.log_folder and teaching.log_folder / f"round-{number + 1}"
            own = distillation.TrainingOptions(log_folder=log)
            training = distillation.run(plan, self.options, own).training
            self._note(out, f"{training['held_out_before']:.4g} → {training['held_out_after']:.4g}")
            if is_first():
                shutil.rmtree(pruned) if pruned.is_dir() else pruned.unlink()
        return out, self.journal.done[out.name]

    def _note(self, out: Path, note: list[str] | str) -> None:
        if is_first():
            self.journal.record(out.name, note)
        else:
            self.journal.done[out.name] = note


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
    is resumed goes on behind those that are done.

    Args:
        source: the checkpoint.
        destination: where the student goes in the end.
        recipe: its `iterate` section says what rounds there are; without one there are none.
        teaching: what every round learns from.
        options: of the run.
        plan_only: nobody trains: the student is pruned at once as far as in the end.

    Raises:
        CompressError: a round cannot be done, or the stopped run had another input, recipe or version.
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
    resumes = options.resume and not plan_only
    silent = replace(options, resume=resumes, latency="off", started=None)
    mark = "" if plan_only else _mark(origin, recipe, teaching)
    if resumes:
        require_same(folder, mark, JOURNAL)  # before the folder is this run's to remove
    with kept_folder(folder, None if plan_only else resumes):
        steps = _Steps(folder, ending, _journal(folder, mark, silent), silent)
        recipes = recipe.iterate.steps(recipe.data, recipe.seed)
        place: Source = source
        told: list[str] = []
        warnings: list[str] = []
        for number, step in enumerate(recipes[-1:] if plan_only else recipes):
            pruned, said = steps.prune(number, place, step)
            warnings += said
            if plan_only or number == len(recipes) - 1:
                yield MadeStudent(pruned, origin, tuple(told), tuple(dict.fromkeys(warnings)))
                return
            place, losses = steps.train(number, pruned, alone, teaching)
            told.append(f"round {number + 1}: sparsity {recipe.iterate.sparsity[number]:g}, held-out loss {losses}")


def _mark(origin: Checkpoint, recipe: DistillRecipe, teaching: Teaching) -> str:
    """Digest of everything that decides what the rounds give."""
    teachers = [open_input(each)[0] for each in teaching.teachers]
    sides = models(origin, teachers, recipe.model, teaching.allow_code)
    samples, _ = fitting_samples(recipe.data, runner(origin).task, sides)
    precision = resolved_precision(recipe.training.precision)
    return fingerprint([origin, *teachers], None, recipe.sha256(), precision, samples.sha256)


def _journal(folder: Path, mark: str, options: Options) -> Journal:
    """The journal of a run that starts or goes on; the first process writes it, once all have read it.

    Raises:
        Refused: the stopped run had another input, recipe or version.
    """
    left = Journal.read(folder, mark, JOURNAL) if options.resume else Journal(folder / JOURNAL, {})
    assembled(torch.device(resolved_device(options.device)))
    if not is_first():
        return left
    return Journal.resume(folder, mark, JOURNAL) if options.resume else Journal.start(folder, mark, JOURNAL)
