"""Make the student of a distillation before training: by structural steps, or of a configuration of its own."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.json_text import parsed
from aicompress.checkpoint.place import lock, working_path
from aicompress.disk import empty, require_writable
from aicompress.errors import CheckpointError, CompressError, Problems, RecipeError, Refused, raise_all
from aicompress.methods.losses import get_loss
from aicompress.model.distillation.drawn_student import drawn_model, save
from aicompress.model.distillation.outputs import runner
from aicompress.model.loading.tokenizer import load_tokenizer
from aicompress.pipeline.distillation.compatibility import output_shapes_of, require_fit
from aicompress.pipeline.step.checks import NOT_OF_TRAINING, known_kinds, place_problems
from aicompress.pipeline.step.input import Adapted, open_input
from aicompress.pipeline.step.options import Options, Progress
from aicompress.pipeline.step.output import Destination, Planned, arrange, lineage_step
from aicompress.pipeline.step.report import Results
from aicompress.pipeline.step.run import OpenOutput, StepRun, assembled, run_step, write_all
from aicompress.pipeline.step.workers import is_first
from aicompress.pipeline.structured import planner, run
from aicompress.pipeline.structured.plan import StructurePlan
from aicompress.pipeline.structured.units.hidden import side_files
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
    if recipe.student.config is None:
        _require_learns(recipe, origin)
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
            plan, report = _cut(place, (origin, made), cut, progress)
            told += _told(plan)
            warnings += report.warnings
            if is_first() and number:
                shutil.rmtree(place)  # type: ignore[arg-type]
            place = made
        yield MadeStudent(Path(place), origin, tuple(told), tuple(dict.fromkeys(warnings)))  # type: ignore[arg-type]


def _require_learns(recipe: DistillRecipe, origin: Checkpoint) -> None:
    """Refuse losses that no student cut out of a checkpoint has, before it is cut.

    Raises:
        Refused: or Problems: naming them.
    """
    run = runner(origin)
    shapes = output_shapes_of(origin, run, recipe)
    require_fit(tuple((get_loss(config.name), config) for config in recipe.losses), (run, shapes), (run,), (shapes,))


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


def _cut(
    source: str | Path | Adapted, sides: tuple[Checkpoint, Path], cut: Recipe, progress: Progress
) -> tuple[StructurePlan, Report]:
    """Run one structural step, of those that lead from a checkpoint to a student.

    Raises:
        CompressError: it cannot be done.
    """
    origin, made = sides
    try:
        plan = planner.make_plan(source, Destination(made, overwrite=True), cut, "prune")
        return plan, run.run(plan, Options(latency="off", progress=progress))
    except CompressError as error:
        for each in error.problems if isinstance(error, Problems) else [error]:
            # What lies between two cuts is nothing that the user knows.
            each.message = f"student: {each.message.replace(str(source), str(origin.path))}"
            each.args = (each.message,)
        raise


def _told(plan: StructurePlan) -> list[str]:
    """What a cut leaves: which blocks went, or how many units of each layer stay."""
    edit, units = plan.edit, plan.choice.pruner.unit.plural
    sizes = [f"{size} of {whole.size}" for whole, size in zip(edit.structures, edit.sizes, strict=True)]
    return [f"student: {note}" for note in edit.notes] or [f"student: {units} {', '.join(dict.fromkeys(sizes))}"]


HINT = "give `student: {config: FILE}` the config.json of a model of transformers, or its folder"
INHERITED = ("architectures", "model_type")  # of IN, where the configuration does not name them


def read_config(path: Path, origin: Checkpoint) -> dict[str, Any]:
    """The configuration of a student, of the kind that IN is where it does not say.

    Raises:
        RecipeError: it cannot be read, or has too few tokens for IN's tokenizer.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        plain = parsed(file.read_bytes())
    except (OSError, ValueError) as error:
        raise RecipeError(f"student.config: {file} cannot be read as JSON", HINT) from error
    if not isinstance(plain, dict):
        raise RecipeError(f"student.config: {file} is no configuration", HINT)
    given = {name: (origin.config or {})[name] for name in INHERITED if (origin.config or {}).get(name)}
    if plain.get("model_type", given.get("model_type")) != given.get("model_type"):
        given.pop("architectures", None)  # another architecture, which has to name its class
    config = {**given, **plain}
    config.pop("quantization_config", None)
    tokenizer, rows = load_tokenizer(origin.source.folder), config.get("vocab_size")
    if tokenizer is not None and isinstance(rows, int) and rows < len(tokenizer):
        told = f"student.config: {rows:,} tokens, and IN's tokenizer has {len(tokenizer):,}"
        raise RecipeError(told, "student and teacher share a tokenizer: give vocab_size at least as many")
    return config


def make(origin: Checkpoint, folder: Path, recipe: DistillRecipe, place: Path, progress: Progress) -> tuple[Path, str]:
    """Write a student of a configuration, as a step from IN: what IN has of the same name and shape is copied.

    Args:
        origin: IN.
        folder: where it goes, and what it is made of meanwhile.
        recipe: its seed draws the rest.
        place: of the student's configuration.
        progress: told of every parameter.

    Returns:
        The student, and what plan and report say of it.

    Raises:
        RecipeError: the configuration cannot be read, or describes no model that IN can teach.
    """
    new, made = folder / "drawn", folder / "configured"
    team = assembled(torch.device("cpu"))
    if is_first():
        _draw(read_config(place, origin), recipe.seed, new)
    team.wait()
    drawn = Checkpoint.open(new)
    specs, known = drawn.parameters(), origin.parameters()
    fits = {name for name, spec in specs.items() if name in known and known[name].shape == spec.shape}
    kinds, _ = known_kinds(drawn)
    infos = {info.tensor: info for info in drawn.layers(kinds)}
    parameters = {name: Planned(spec, info=infos.get(name)) for name, spec in specs.items()}
    ungated = recipe.model_copy(update={"gates": ()})  # they judge what is trained
    step = lineage_step("student", ungated, origin.source)
    output = arrange(origin, Destination(made, overwrite=True), parameters, step, drawn.config)
    output = replace(output, files=_side_files(origin, drawn))

    def value(name: str) -> Tensor:
        tensor: Tensor = (origin if name in fits else drawn).dense(name)
        return tensor.to(specs[name].dtype)

    def write(opened: OpenOutput) -> Results:
        write_all(output, opened.writer, lambda name: [(value(name), None)], progress)
        return Results()

    run_step(StepRun(origin, kinds, ungated, output, write), team, Options(latency="off"))
    sizes = {name: math.prod(spec.shape) for name, spec in specs.items()}
    copied, total = sum(sizes[name] for name in fits), sum(sizes.values())
    named = f"{(drawn.config or {})['architectures'][0]} of {place.name}"
    return made, f"student: a {named}, {copied:,} of its {total:,} numbers copied from IN, the others drawn"


def _draw(config: dict[str, Any], seed: int, folder: Path) -> None:
    """Save a model of a configuration.

    Raises:
        RecipeError: transformers does not take it.
    """
    try:
        model = drawn_model(config, seed)
    except CheckpointError as error:
        hint = "check its sizes against each other, and that transformers knows its architecture"
        raise RecipeError(f"student.config: {error.message}", hint) from error
    save(model, folder)


def _side_files(origin: Checkpoint, drawn: Checkpoint) -> dict[Path, bytes]:
    """Files beside the weights that say how wide the model is."""
    before, now = ((each.config or {}).get("hidden_size") for each in (origin, drawn))
    if not isinstance(before, int) or not isinstance(now, int) or before == now:
        return {}
    return side_files(origin, before, now)
