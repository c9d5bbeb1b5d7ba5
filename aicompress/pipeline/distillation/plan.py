"""Plan a distillation: check checkpoints, recipe and data against each other, and lay out the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from aicompress.checkpoint import Checkpoint
from aicompress.disk import require_writable
from aicompress.errors import RecipeError, raise_all
from aicompress.layer import Kind, LayerInfo
from aicompress.methods.losses import get_loss
from aicompress.methods.outputs import OutputShapes
from aicompress.model.distillation.outputs import Runner, runner
from aicompress.model.loading.tokenizer import vocabulary_digest
from aicompress.pipeline.distillation import temperature
from aicompress.pipeline.distillation.compatibility import (
    Losses,
    output_shapes_of,
    require_classes,
    require_fit,
    require_teacher,
    token_numbers,
    tokenizer_warnings,
)
from aicompress.pipeline.distillation.data.samples import TrainingSamples, bare_module, fitting_samples, models
from aicompress.pipeline.distillation.data.splits import Split, split_of
from aicompress.pipeline.distillation.made_student import MadeStudent
from aicompress.pipeline.distillation.signals import outputs as stored_outputs
from aicompress.pipeline.distillation.signals.folder import SignalFolder
from aicompress.pipeline.distillation.signals.outputs import StoredOutputs, Taught
from aicompress.pipeline.distillation.teachers import mean_teacher
from aicompress.pipeline.distillation.teachers.teacher import CACHE_BYTES, TOKENS, Loss
from aicompress.pipeline.distillation.trained import recoding
from aicompress.pipeline.distillation.trained.student_mode import StudentMode, keeps_zeros
from aicompress.pipeline.step.checks import NOT_OF_TRAINING, known_kinds, left_out, place_problems, require_space
from aicompress.pipeline.step.dry_run import summarize
from aicompress.pipeline.step.input import Adapted, open_input
from aicompress.pipeline.step.opening import as_stored
from aicompress.pipeline.step.output import Destination, Output, arrange, lineage_step
from aicompress.recipe.distillation import DistillRecipe, Training
from aicompress.report.plan import PlanRow, PlanSummary

Source = str | Path | Adapted
NO_SAMPLES = torch.empty(0, dtype=torch.long)
READS = "the teacher reads the student's {:,} tokens by its own numbers of them"


@dataclass(frozen=True)
class DistillPlan:
    """A planned distillation, to be run or printed.

    Attributes:
        checkpoint: the student.
        teachers: one or several; the student as it came, where that learns from its own average.
        recipe: what to do.
        losses: terms of the loss.
        training: the recipe's settings, precision resolved.
        runner, teacher_runners: how the models are run.
        numbers: for each teacher its numbers of the student's tokens; None where they are the student's.
        layers: every layer of the student.
        samples: what is learnt from, tokenized.
        split: which samples are trained on, and when.
        output: every file and byte of the output.
        kinds: what the model definition says of the parameters.
        student_mode: what of the student moves.
        keep_zeros: weights that are zero stay zero.
        cached: indices of the samples for which the teacher's outputs are computed once.
        warnings: what the user should know.
        allow_code: a factory that the recipe names may run.
        made: how the student was made, where the recipe makes it.
        stored: what of the teacher's outputs is stored, or is read instead of running it.
    """

    checkpoint: Checkpoint
    teachers: tuple[Checkpoint, ...]
    recipe: DistillRecipe
    losses: Losses
    training: Training
    runner: Runner
    teacher_runners: tuple[Runner, ...]
    numbers: tuple[Tensor | None, ...]
    layers: tuple[LayerInfo, ...]
    samples: TrainingSamples
    split: Split
    output: Output
    kinds: Mapping[str, Kind | None] | None
    student_mode: StudentMode
    keep_zeros: bool
    cached: Tensor
    warnings: tuple[str, ...]
    allow_code: bool = False
    made: MadeStudent | None = None
    stored: StoredOutputs | None = None

    @property
    def caches_training(self) -> bool:
        """Whether the teacher's outputs for training samples are computed once, or read, and not at every step."""
        return self.stored is not None or len(self.cached) > len(self.split.held_out)

    @property
    def origin(self) -> Checkpoint:
        """The checkpoint that was given: the student, or what the student was cut out of."""
        return self.checkpoint if self.made is None else self.made.origin

    def module_of(self, checkpoint: Checkpoint) -> nn.Module | None:
        """The module of a bare student or teacher, to be filled; None for one that names its architecture."""
        return bare_module(checkpoint, self.recipe.model, self.allow_code)

    def summary(self) -> PlanSummary:
        """What a dry run prints."""
        first = () if self.recipe.mean_teacher is None else ("cross-entropy",)
        name = " + ".join((*first, *(method.name for method, _ in self.losses)))
        rows = [
            PlanRow(i.name, i.kind, "method", i.stored, form, {"loss": name, **self._shape(i)}, i.nbytes, size)
            for i in self.layers
            for size, form in [(self.output.nbytes(i.tensor, i.part), self._form(i))]
        ]
        summary = summarize(self.output, self.origin, rows, 0, self.warnings)
        return replace(summary, notes=(*summary.notes, *self.told))

    @property
    def told(self) -> tuple[str, ...]:
        """What has been settled: what the student was made of, what of it moves, and what is saved."""
        average = () if self.recipe.mean_teacher is None else (mean_teacher.TOLD,)
        tokens = [READS.format(len(numbers)) for numbers in self.numbers if numbers is not None]
        told = (*(self.made.told if self.made else ()), *self.student_mode.told, *average, *tokens)
        return (*told, *temperature.planned(self.losses, self.split), *((self.stored.note,) if self.stored else ()))

    @property
    def further(self) -> dict[str, Checkpoint]:
        """Inputs beside the student by their names in the lineage; a mean teacher is none."""
        return {} if self.recipe.mean_teacher is not None else _named(self.teachers)

    def _form(self, info: LayerInfo) -> str:
        """The form that a layer is written in."""
        weight = self.output.parameters[info.tensor].weight
        return info.stored if info.part or weight is None else weight.form

    def _shape(self, info: LayerInfo) -> dict[str, str]:
        """The shape of a layer of a student that the recipe makes."""
        return {} if self.made is None else {"shape": " × ".join(map(str, info.tensor_shape))}


def make_plan(
    source: Source | MadeStudent,
    teacher_source: Source | Sequence[Source] | None,
    destination: Destination,
    recipe: DistillRecipe,
    allow_code: bool = False,
    cache: Path | None = None,
) -> DistillPlan:
    """Check everything and lay out the output; reads headers, configs and the data.

    Args:
        source: the student's checkpoint, or the student that the recipe made.
        teacher_source: the teacher's, or those of several that are averaged; None for a mean teacher.
        destination: where the trained student goes.
        recipe: what to do.
        allow_code: a factory that the recipe names may run.
        cache: folder of a teacher's stored outputs, which is made where it is not there.

    Raises:
        Refused: or Problems, everything that is wrong.
    """
    made, place = (source, source.path) if isinstance(source, MadeStudent) else (None, source)
    given = [teacher_source] if isinstance(teacher_source, str | Path | Adapted) else list(teacher_source or ())
    student, tied, teachers, folder = _opened(place, given, cache, destination, recipe)
    run = runner(student)
    losses = tuple((get_loss(config.name), config) for config in recipe.losses)
    shapes = output_shapes_of(student, run, recipe, allow_code)
    taught = _taught(teachers, student, recipe, allow_code) if folder is None or teachers else Taught.of_folder(folder)
    require_fit(losses, (run, shapes), taught.runs, taught.all_shapes)
    kinds, warnings = known_kinds(student)
    samples, told = fitting_samples(recipe.data, run.task, models(student, teachers, recipe.model, allow_code))
    require_classes(samples, shapes)
    average = recipe.mean_teacher
    raise_all([] if average is None else mean_teacher.problems(average, run, shapes, samples))
    training = recipe.training.model_copy(update={"precision": resolved_precision(recipe.training.precision)})
    student_mode = StudentMode.of(student, recipe.mode)
    uncoded = recoding.problems(student, student_mode, average is not None)
    raise_all([*student_mode.problems(training, () if cache else teachers, student), *uncoded])
    split, training, smaller = split_of(samples, training, recipe)
    stored = (
        None if cache is None else stored_outputs.planned((cache, folder), recipe, losses, samples, taught, student)
    )
    layers = tuple(student.layers(kinds))
    further = {name: each.source for name, each in _named(teachers).items()} if average is None else {}
    step = lineage_step("distill", recipe, student.source, {**further, **student.foreign.beside})
    step |= {} if stored is None else stored.lineage(bool(teachers))
    planned = recoding.coded_outlines(student, student_mode, as_stored(student, layers))
    output = arrange(student, destination, planned, step)
    require_space(output)
    alike = [teacher for teacher, numbers in zip(teachers, taught.numbers, strict=False) if numbers is None]
    told += [line for teacher in alike for line in tokenizer_warnings(student, teacher)]
    told += [*smaller, *left_out(student, destination)]
    return DistillPlan(
        student, teachers, recipe, losses, training, run, taught.runs, taught.numbers, layers, samples, split, output,
        kinds, student_mode, keeps_zeros(training, student, student_mode.mode),
        NO_SAMPLES if average is not None or stored is not None
        else _cached(training, losses, (taught.runs[0], taught.all_shapes[0]), samples, split),
        tuple(dict.fromkeys((*(made.warnings if made else ()), *tied, *warnings, *told, *output.warnings))),
        allow_code, made, stored,
    )  # fmt: skip


def _opened(
    place: Source, given: Sequence[Source], cache: Path | None, destination: Destination, recipe: DistillRecipe
) -> tuple[Checkpoint, list[str], tuple[Checkpoint, ...], SignalFolder | None]:
    """The student with warnings of its tied parameters, the teachers, and the folder of stored outputs that is there.

    Raises:
        Refused: or Problems: one of them cannot be read, or OUT is taken.
    """
    folder = stored_outputs.opened(cache, recipe)
    require_teacher(recipe, len(given), folder is not None)
    student, tied = open_input(place)
    teachers = tuple(open_input(each)[0] for each in given) or (() if folder is not None else (student,))
    if cache is not None:
        stored_outputs.require_apart_from(cache, [student, *teachers], destination.path)
    raise_all(place_problems([student, *teachers], destination, recipe.gates, NOT_OF_TRAINING))
    require_writable(destination.path)
    return student, list(tied), teachers, folder


def _taught(teachers: tuple[Checkpoint, ...], student: Checkpoint, recipe: DistillRecipe, allow_code: bool) -> Taught:
    """What is known of teachers from their headers, configs and tokenizers."""
    runs = tuple(runner(teacher) for teacher in teachers)
    numbers = tuple(token_numbers(student, teacher) for teacher in teachers)
    all_shapes = [output_shapes_of(each, run, recipe, allow_code) for each, run in zip(teachers, runs, strict=True)]
    for place, (run, known) in enumerate(zip(runs, numbers, strict=True)):
        if known is not None and run.task in TOKENS:
            digest = vocabulary_digest(student.source.folder)
            all_shapes[place] = replace(all_shapes[place], classes=len(known), tokenizer=digest)
    return Taught(teachers, runs, tuple(all_shapes), numbers)


def _named(teachers: Sequence[Checkpoint]) -> dict[str, Checkpoint]:
    """Teachers by their names in the lineage: teacher, teacher_2 and so on."""
    return {f"teacher_{number}" if number > 1 else "teacher": each for number, each in enumerate(teachers, start=1)}


def resolved_precision(precision: str) -> str:
    """bf16 where `auto` finds a processor that multiplies bfloat16 in hardware, else fp32.

    Told by the instruction set alone, not by timing, so that equal runs on one machine are equal.
    """
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def _cached(
    training: Training, losses: Losses, teacher: tuple[Runner, OutputShapes], samples: TrainingSamples, split: Split
) -> Tensor:
    """Samples for which the teacher's outputs are computed once: all that are used, the held-out ones alone, or none.

    Held-out samples are looked at again and again; training samples where there are more steps than fill an epoch.
    """
    run, shapes = teacher
    reads = Loss(losses).reads
    length = next(iter(samples.columns.values())).shape[-1]
    padded = run.task == "causal" and "attention_mask" in samples.columns  # samples give outputs of different lengths
    size = None if padded else run.output_bytes(reads, shapes, length)
    if training.cache is True and size is None:
        raise RecipeError("hidden states and masked logits are too large to cache", "training.cache: auto")
    if training.cache is False or size is None:
        return NO_SAMPLES
    used = torch.cat([split.used(training.steps), split.held_out])
    if training.cache is True or (split.repeats(training.steps) and size * len(used) <= CACHE_BYTES):
        return used
    return split.held_out if size * len(split.held_out) <= CACHE_BYTES else NO_SAMPLES
