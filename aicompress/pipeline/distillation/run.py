"""Distillation: a student checkpoint in, the same checkpoint with trained weights out, closer to its teacher."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.place import working_path
from aicompress.errors import Refused
from aicompress.layer import LayerInfo
from aicompress.methods.modes import BlockTuning, LayerCorrection
from aicompress.pipeline.distillation import movement
from aicompress.pipeline.distillation.layer_by_layer.block_files import BlockFiles
from aicompress.pipeline.distillation.layer_by_layer.blockwise import BlockwiseTuning
from aicompress.pipeline.distillation.layer_by_layer.correction import correct_layers
from aicompress.pipeline.distillation.loop import log
from aicompress.pipeline.distillation.loop.log import TrainingLog
from aicompress.pipeline.distillation.loop.shards import gathered
from aicompress.pipeline.distillation.loop.state import FOLDER, StateFile
from aicompress.pipeline.distillation.loop.trainer import Trainer
from aicompress.pipeline.distillation.models import at_temperature, loaded, with_stored
from aicompress.pipeline.distillation.plan import DistillPlan
from aicompress.pipeline.distillation.report_section import blockwise_section, training_section
from aicompress.pipeline.distillation.signals.teacher import StoredTeacher
from aicompress.pipeline.distillation.trained.student import Student
from aicompress.pipeline.step.checks import known_kinds
from aicompress.pipeline.step.digests import fingerprint
from aicompress.pipeline.step.models.running_model import resolved_device
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.report import Results
from aicompress.pipeline.step.run import OpenOutput, StepRun, assembled, require_resumable, run_step
from aicompress.recipe.distillation import Training
from aicompress.report.model import LayerRow, Report
from aicompress.weights import Weight


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
    if plan.student_mode.config.layer_by_layer and own.movement_file is not None:
        raise Refused(
            f"mode {plan.student_mode.mode.name} takes no steps of a gradient: it has no movement", "mode: full"
        )
    folder = working_path(plan.output.destination.path)
    if isinstance(plan.student_mode.config, BlockTuning):
        _require_rows(plan.split.first(plan.student_mode.config.samples), plan.training.batch, team.size)
        tuning = BlockwiseTuning(plan, device, team, BlockFiles(folder / FOLDER, plan.checkpoint), options.progress)
        write = partial(write_tuned, plan, tuning)
        report = run_step(_step(plan, write, tuning.heal, mark, start), team, options)
        log.write_curve(own.log_folder if team.rank == 0 else None, tuning.history.curve)
        return report
    setup, student, trained = loaded(plan, device, team, options.progress)
    state = StateFile(folder)
    kept = team.gather(state.temperature() if options.resume else None)[0]
    setup, temperature = at_temperature(plan, setup, trained, kept, team, options.progress)
    setup = with_stored(plan, setup, (device, team), temperature, options.progress)
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
    closed = isinstance(plan.student_mode.config, LayerCorrection)
    if options.resume and not closed:
        trainer.resume()
    if own.log_folder is not None and trainer.team.rank == 0:
        trainer.log = TrainingLog(own.log_folder, trainer.history.step)
    try:
        if isinstance(plan.student_mode.config, LayerCorrection):
            correct_layers(trainer, student, plan.student_mode.config)
        else:
            trainer.run(options.progress, own.save_seconds)
    finally:
        if trainer.log is not None:
            trainer.log.close()
    shards, moved = trainer.setup.shards, trainer.tensors.movement
    if shards.divided:  # every process is here, and the first one is about to write
        student.stored.update(gathered(student.stored, keeps=trainer.team.rank == 0))
        trainer.tensors.movement = {name: shards.whole(name, tensor) for name, tensor in moved.items()}


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
    if trainer.lost_patience and trainer.history.step < plan.training.steps:
        ended = f"training ended at step {trainer.history.step} of {plan.training.steps}"
        notes = (*notes, f"{ended}: {plan.training.patience} measurements in a row were no better than the best")
    return Results(rows, warnings, training=section, notes=notes)


UNCHANGED = "no step was better than the input on the held-out samples: the weights are the input's"


def write_tuned(plan: DistillPlan, tuning: BlockwiseTuning, opened: OpenOutput) -> Results:
    """Tune all blocks, and write every parameter of what is better, with a row for each layer."""
    tuning.heal()
    places = tuning.files.names()
    better = tuning.history.best_step > 0
    student = Student(plan.checkpoint, plan.student_mode, {name: {} for name in places}, {})

    def value_of(name: str) -> Tensor | Weight:
        return tuning.files.value(name, places[name]) if better and name in places else student.original(name)

    rows = written(plan, student, value_of, opened)
    StateFile(tuning.files.folder.parent).remove()
    moved = sum(math.prod(plan.checkpoint.parameters()[name].shape) for name in places)
    warnings = plan.warnings if better else (*plan.warnings, UNCHANGED)
    return Results(rows, warnings, training=blockwise_section(tuning, moved), notes=plan.told)


def written(
    plan: DistillPlan, student: Student, value_of: Callable[[str], Tensor | Weight], opened: OpenOutput
) -> tuple[LayerRow, ...]:
    """Write every parameter; returns a row for each layer."""
    infos: dict[str, list[LayerInfo]] = {}
    for info in plan.layers:
        infos.setdefault(info.tensor, []).append(info)
    rows: list[LayerRow] = []
    for name in plan.output.parameters:
        value = value_of(name)
        for disk, tensor in plan.output.encode(name, value).items():
            opened.writer.put(disk, tensor)
        rows += [
            student.row(info, value, plan.recipe.method.name, plan.output.nbytes(name, info.part))
            for info in infos.get(name, [])
        ]
    return tuple(rows)
