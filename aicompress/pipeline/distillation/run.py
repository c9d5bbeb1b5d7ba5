"""Distillation: a student checkpoint in, the same checkpoint with trained weights out, closer to its teacher."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.place import working_path
from aicompress.errors import Refused
from aicompress.methods.healing import BlockTuning, LayerCorrection
from aicompress.model.blocks.input_errors import input_errors_refused
from aicompress.model.distillation.fp32_attention import attend_in_float32
from aicompress.model.distillation.outputs import prepare
from aicompress.model.distillation.recomputation import recompute_activations
from aicompress.model.loading.load import trainable
from aicompress.pipeline.distillation import movement
from aicompress.pipeline.distillation.loop import log
from aicompress.pipeline.distillation.loop.log import TrainingLog
from aicompress.pipeline.distillation.loop.state import FOLDER, ChosenTemperature, StateFile
from aicompress.pipeline.distillation.loop.trainer import Trainer, TrainingSetup
from aicompress.pipeline.distillation.mean_teacher import Averaged
from aicompress.pipeline.distillation.optimizer import TrainedParameters
from aicompress.pipeline.distillation.plan import DistillPlan
from aicompress.pipeline.distillation.recoding import Recoding
from aicompress.pipeline.distillation.report_section import training_section
from aicompress.pipeline.distillation.signals.teacher import StoredTeacher, made
from aicompress.pipeline.distillation.student import Student
from aicompress.pipeline.distillation.teacher import Loss, Panel, Runnable, Teacher, with_cached_outputs
from aicompress.pipeline.distillation.temperature import chosen
from aicompress.pipeline.distillation.twin.block_files import BlockFiles
from aicompress.pipeline.distillation.twin.blockwise import BlockwiseTuning
from aicompress.pipeline.distillation.twin.correction import correct_layers
from aicompress.pipeline.distillation.writing import UNCHANGED, write_tuned, written
from aicompress.pipeline.step.checks import known_kinds
from aicompress.pipeline.step.digests import fingerprint
from aicompress.pipeline.step.options import Options, Progress
from aicompress.pipeline.step.report import Results
from aicompress.pipeline.step.run import OpenOutput, StepRun, assembled, require_resumable, run_step
from aicompress.pipeline.step.running_model import resolved_device
from aicompress.pipeline.step.workers import Processes
from aicompress.recipe.distillation import Training
from aicompress.report.model import Report


@dataclass(frozen=True)
class TrainingOptions:
    """Options of a distillation alone; nothing here changes the numbers.

    Attributes:
        save_seconds: least time between two saved states.
        movement_file: where to keep the movement of every trained matrix, for movement pruning; None keeps none.
        log_folder: where to log the numbers of every step; None logs none.
    """

    save_seconds: float = 60.0
    movement_file: Path | None = None
    log_folder: Path | None = None


def run(plan: DistillPlan, options: Options = Options(), own: TrainingOptions = TrainingOptions()) -> Report:
    """Train the student and write it, its report inside.

    Under torchrun every rank trains and the first one writes; the others return its report.

    Raises:
        CompressError: a loss is not a number; nothing is left behind.
        OutOfSpace: the disk is full; nothing is left behind.
    """
    start = time.perf_counter()
    movement.require_free(own.movement_file)
    log.require_free(own.log_folder, options.resume)
    decided: list[Any] = [plan.recipe.sha256(), plan.training.precision, plan.samples.sha256]
    decided += [] if plan.stored is None else [plan.stored.identity]
    decided += [] if plan.made is None else [plan.checkpoint.config]
    mark = fingerprint([plan.origin, *plan.further.values()], plan.output, *decided)
    if options.resume:  # before both models are loaded
        require_resumable(plan.output, mark)
    device = torch.device(resolved_device(options.device))
    team = assembled(device)
    _require_divisible(plan.training, team.size)
    if plan.healing.config.of_a_twin and own.movement_file is not None:
        raise Refused(f"mode {plan.healing.mode.name} takes no steps of a gradient: it has no movement", "mode: full")
    folder = working_path(plan.output.destination.path)
    if isinstance(plan.healing.config, BlockTuning):
        _require_rows(plan.split.first(plan.healing.config.samples), plan.training.batch, team.size)
        tuning = BlockwiseTuning(plan, device, team, BlockFiles(folder / FOLDER, plan.checkpoint), options.progress)
        write = partial(write_tuned, plan, tuning)
        report = run_step(_step(plan, write, tuning.heal, mark, start), team, options)
        log.write_curve(own.log_folder if team.rank == 0 else None, tuning.history.curve)
        return report
    setup, student = _setup(plan, device, options.progress)
    setup, trained = _recoded(plan, setup, student)
    state = StateFile(folder)
    kept = team.gather(state.temperature() if options.resume else None)[0]
    setup, temperature = _at_temperature(plan, setup, trained, kept, team, options.progress)
    setup = _with_stored(plan, setup, (device, team), temperature, options.progress)
    watched = movement.watched(student) if own.movement_file else ()
    trainer = Trainer(setup, trained, plan.training, state, team, watched)
    trainer.history.temperature = temperature
    train = partial(_train, plan, trainer, student, options, own)
    write = partial(_write, plan, student, trainer, train)
    step = _step(plan, write, train, mark, start)
    report = run_step(step, team, options)
    if own.movement_file is not None and team.rank == 0:
        written = Checkpoint.open(plan.output.destination.path)
        movement.write(own.movement_file, written, plan.layers, trainer, plan.samples.source)
    return report


def _train(plan: DistillPlan, trainer: Trainer, student: Student, options: Options, own: TrainingOptions) -> None:
    """Train, from where a stopped run was; the first process logs."""
    closed = isinstance(plan.healing.config, LayerCorrection)
    if options.resume and not closed:
        trainer.resume()
    if own.log_folder is not None and trainer.team.rank == 0:
        trainer.log = TrainingLog(own.log_folder, trainer.history.step)
    try:
        if isinstance(plan.healing.config, LayerCorrection):
            correct_layers(trainer, student, plan.healing.config)
        else:
            trainer.run(options.progress, own.save_seconds)
    finally:
        if trainer.log is not None:
            trainer.log.close()


def _step(
    plan: DistillPlan, write: Callable[[OpenOutput], Results], follow: Callable[[], None], mark: str, start: float
) -> StepRun:
    """The step that `write` carries out in the first process, and `follow` in the others."""
    return StepRun(
        checkpoint=plan.checkpoint,
        kinds=plan.kinds if plan.made is None else known_kinds(plan.origin)[0],
        recipe=plan.recipe,
        output=plan.output,
        write=write,
        follow=follow,
        fingerprint=mark,
        further=plan.further,
        compared=plan.origin,
        seconds=time.perf_counter() - start,
    )


def _require_divisible(training: Training, processes: int) -> None:
    if training.batch % (training.accumulate * processes):
        parts = f"{processes} processes in {training.accumulate} parts"
        raise Refused(f"training.batch {training.batch} cannot be divided over {parts}", "change one of them")


def _require_rows(index: Tensor, batch: int, processes: int) -> None:
    """Refuse a last batch that has no row for some process."""
    if 0 < (left := len(index) % batch) < processes:
        what = f"{len(index)} samples to tune on leave {left} for the last batch, and {processes} processes share it"
        raise Refused(what, f"mode.samples: {max(len(index) - left, processes)}")


def _setup(plan: DistillPlan, device: torch.device, progress: Progress) -> tuple[TrainingSetup, Student]:
    """All models, loaded, and the teacher's outputs where they are worth keeping."""
    loss = Loss(plan.losses)
    model = _load(plan.checkpoint, plan.module_of(plan.checkpoint), device)
    complete = plan.stored is not None and plan.stored.folder is not None
    needed = () if complete else plan.teachers
    teachers = [_load(each, plan.module_of(each), device).requires_grad_(False) for each in needed]
    for each in (model, *teachers):
        prepare(each, loss.reads)
    if plan.training.precision == "bf16" and device.type == "cpu":
        attend_in_float32(model)
    if plan.training.activation_checkpointing:
        recompute_activations(model)
    student = Student.of(model, plan.checkpoint, plan.healing)
    uncached = torch.full((len(plan.samples),), -1)
    how = zip(teachers, plan.teacher_runners, plan.numbers, strict=False)
    panel = Panel(tuple(Runnable(each, run, numbers) for each, run, numbers in how))
    first = plan.samples.batch(plan.split.train[:1]).to(device)
    with torch.no_grad(), input_errors_refused("training data"):  # a plan does not run what a factory builds
        for side in (Runnable(model, plan.runner), *panel.members):
            side(first, loss.reads, "fp32")
    if plan.stored is not None and plan.stored.folder is not None:
        read = StoredTeacher(plan.stored, plan.stored.folder)
        return TrainingSetup(Runnable(model, plan.runner), read, loss, plan.samples, plan.split), student
    teacher = Teacher(panel, loss.reads, {}, uncached)
    if len(plan.cached):
        batches = plan.split.in_order(plan.cached, plan.training.batch)
        report = partial(_of_teacher, progress if plan.caches_training else _quiet, len(plan.cached))
        teacher = with_cached_outputs(teacher, plan.samples, batches, device, report)
    averaged = None if plan.stored is not None else _averaged(plan, panel.members[0])
    return TrainingSetup(Runnable(model, plan.runner), teacher, loss, plan.samples, plan.split, averaged), student


def _at_temperature(
    plan: DistillPlan,
    setup: TrainingSetup,
    trained: TrainedParameters,
    kept: ChosenTemperature | None,
    team: Processes,
    progress: Progress,
) -> tuple[TrainingSetup, ChosenTemperature | None]:
    """The setup with a temperature where the recipe leaves it open.

    It is the one that a stopped run has kept, that of stored outputs, or one that is chosen now.
    """
    if not setup.loss.leaves_open:
        return setup, None
    stored = None if plan.stored is None else plan.stored.told["temperature"]
    if kept is not None:
        temperature = kept
    elif stored is not None:
        temperature = ChosenTemperature(stored, {}, 0)
    else:
        temperature = chosen(setup, trained, plan.training, team, partial(progress, "temperature"))
    return replace(setup, loss=setup.loss.at_temperature(temperature.value)), temperature


def _with_stored(
    plan: DistillPlan,
    setup: TrainingSetup,
    where: tuple[torch.device, Processes],
    temperature: ChosenTemperature | None,
    progress: Progress,
) -> TrainingSetup:
    """The setup with a teacher whose outputs are read, once they are stored, where the plan stores them."""
    if plan.stored is None or not isinstance(setup.teacher, Teacher):
        return setup
    stored = plan.stored if temperature is None else plan.stored.at_temperature(temperature.value)
    report = partial(_of_teacher, progress, len(plan.samples))
    return replace(setup, teacher=made(stored, setup.teacher.side, plan.samples, *where, report))


def _quiet(what: str, done: int, total: int) -> None:
    """Tell nothing of what takes no longer than a measurement."""


def _of_teacher(progress: Progress, samples: int, done: int) -> None:
    progress("teacher", done, samples)


def _recoded(plan: DistillPlan, setup: TrainingSetup, student: Student) -> tuple[TrainingSetup, TrainedParameters]:
    """What is trained; of a student that is learnt as codes, what these are made of, and its model runs with them."""
    recodes = plan.healing.mode.recodes
    if recodes is None:
        return setup, student.trained(plan.keep_zeros)
    recoding = Recoding.of(student, setup.student.model, recodes, plan.recipe.seed)
    return replace(setup, recoding=recoding), recoding.trained(student, plan.keep_zeros)


def _averaged(plan: DistillPlan, teacher: Runnable) -> Averaged | None:
    """The average of the student in the teacher's model; None where the teacher is another checkpoint."""
    settings = plan.recipe.mean_teacher
    if settings is None:
        return None
    parameters = Student.of(teacher.model, plan.checkpoint, plan.healing).trained(keep_zeros=False).parameters
    teacher.model.requires_grad_(False)
    tensors = {name: tensor.detach() for name, tensor in parameters.items()}
    return Averaged(settings, plan.recipe.seed, teacher, tensors)


def _load(checkpoint: Checkpoint, module: nn.Module | None, device: torch.device) -> nn.Module:
    """A model with its compressed layers decoded in the graph, without dropout and with fixed batch statistics."""
    loaded: nn.Module = trainable(checkpoint, model=module, device=device)
    return loaded.eval()


def _write(
    plan: DistillPlan,
    student: Student,
    trainer: Trainer,
    train: Callable[[], None],
    opened: OpenOutput,
) -> Results:
    """Train, and write every parameter of the best student, with a row for each layer."""
    train()
    better = trainer.history.best_step > 0
    recoding = trainer.setup.recoding
    value_of = (student.value if better else student.original) if recoding is None else partial(recoding.value, student)
    rows = written(plan, student, value_of, opened)
    trainer.state.remove()
    warnings = plan.warnings if better else (*plan.warnings, UNCHANGED)
    if trainer.unsaved:
        lost = f"the disk was full when {trainer.unsaved} states of the training were to be saved"
        warnings = (*warnings, f"{lost}: a stopped run would have gone on from the one before")
    if trainer.log is not None and trainer.log.trouble:
        warnings = (*warnings, trainer.log.trouble)
    section = training_section(trainer, tuple(plan.further.values()), plan.caches_training)
    teacher = trainer.setup.teacher
    section |= {"signals": teacher.stored.summary()} if isinstance(teacher, StoredTeacher) else {}
    temperature = trainer.history.temperature
    section |= {} if temperature is None else {"temperature": temperature.summary()}
    notes = plan.told if temperature is None else (*plan.told, temperature.note)
    return Results(rows, warnings, training=section, notes=notes)
