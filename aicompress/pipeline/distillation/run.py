"""Distillation: a student checkpoint in, the same checkpoint with trained weights out, closer to its teacher."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aicompress import __version__
from aicompress.checkpoint import Checkpoint, CheckpointWriter
from aicompress.checkpoint.journal import Journal, require_same
from aicompress.checkpoint.place import working_path
from aicompress.errors import Refused
from aicompress.model.distillation.fp32_attention import attend_in_float32
from aicompress.model.loading.load import trainable
from aicompress.pipeline.distillation import movement
from aicompress.pipeline.distillation.plan import DistillPlan, make_plan, with_all_digests
from aicompress.pipeline.distillation.student import Student
from aicompress.pipeline.distillation.teacher import Loss, Side, Teacher, remember
from aicompress.pipeline.distillation.training import Lesson, Trainer
from aicompress.pipeline.distillation.training_state import StateFile
from aicompress.pipeline.step.digests import hashing
from aicompress.pipeline.step.options import Mode
from aicompress.pipeline.step.report import Facts, finish, written_report
from aicompress.pipeline.step.running_model import resolved_device
from aicompress.pipeline.step.workers import Processes, processes
from aicompress.recipe.distillation import Training
from aicompress.report.model import LayerRow, Report
from aicompress.weights import Weight


@dataclass(frozen=True)
class Options:
    """How a distillation runs; nothing here changes the numbers.

    Attributes:
        resume: go on where a stopped run of the same step was.
        latency: "auto" times the forward passes of input and output, "off" does not.
        progress: called with (what, done, total).
        save_seconds: least time between two saved states.
        device: cpu, cuda, or auto for a GPU where there is one.
        stats: a file that is to hold the movement of every trained matrix, for movement pruning; None keeps none.
    """

    resume: bool = False
    latency: Mode = "auto"
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    save_seconds: float = 60.0
    device: str = "cpu"
    stats: Path | None = None


def run(plan: DistillPlan, options: Options | None = None) -> Report:
    """Train the student and write it, its report inside.

    Under torchrun every rank trains and the first one writes; the others return its report.

    Raises:
        CompressError: a loss is not a number; nothing is left behind.
        OutOfSpace: the disk is full; nothing is left behind.
    """
    options = options or Options()
    start = time.perf_counter()
    movement.require_free(options.stats)
    mark = fingerprint(plan)
    if options.resume:
        require_same(working_path(plan.output.destination.path), mark)
    device = torch.device(resolved_device(options.device))
    team = processes(device)
    if plan.training.batch % (plan.training.accumulate * team.size):
        parts = f"{team.size} processes in {plan.training.accumulate} parts"
        raise Refused(f"training.batch {plan.training.batch} cannot be divided over {parts}", "change one of them")
    lesson, student = _lesson(plan, device, options)
    watched = movement.watched(student) if options.stats else {}
    if team.rank != 0:
        state = StateFile(working_path(plan.output.destination.path))
        trainer = Trainer(lesson, student.trained(plan.keep_zeros), plan.training, state, team, tuple(watched))
        if options.resume:
            trainer.resume()
        trainer.run(options.progress, options.save_seconds)
        team.wait()
        return written_report(plan.output)
    output = plan.output
    with (
        CheckpointWriter(output.destination.path, output.shards, options.resume) as writer,
        hashing(plan.checkpoint.source) as of_student,
        hashing(plan.teacher.source) as of_teacher,
    ):
        (Journal.resume if options.resume else Journal.start)(writer.work, mark)
        state = StateFile(writer.work)
        trainer = Trainer(lesson, student.trained(plan.keep_zeros), plan.training, state, team, tuple(watched))
        if options.resume:
            trainer.resume()
        trainer.run(options.progress, options.save_seconds)
        rows = _write(plan, student.value if trainer.course.best_step else student.original, student, writer)
        state.remove()
        facts = _facts(plan, student, trainer, rows, start)
        final = with_all_digests(output, of_student.result(), of_teacher.result())
        report = finish(facts, final, writer, options.latency)
    if options.stats is not None:
        movement.write(options.stats, plan, watched, trainer)
    team.wait()
    return report


def _lesson(plan: DistillPlan, device: torch.device, options: Options) -> tuple[Lesson, Student]:
    """Both models, loaded, and the teacher's outputs where they are worth keeping."""
    model = _load(plan.checkpoint, plan.student_module(), device)
    if plan.training.precision == "bf16" and device.type == "cpu":
        attend_in_float32(model)
    student = Student.of(model, plan.checkpoint)
    tutor = _load(plan.teacher, plan.teacher_module(), device).requires_grad_(False)
    loss = Loss(plan.losses)
    unknown = torch.full((len(plan.samples),), -1)
    teacher = Teacher(Side(tutor, plan.teacher_runner), loss.reads, {}, unknown)
    if plan.cached:
        index = torch.cat([plan.division.used(plan.training.steps), plan.division.held_out])
        batches = plan.division.in_order(index, plan.training.batch)
        teacher = remember(
            teacher, plan.samples, batches, device, lambda done: options.progress("teacher", done, len(index))
        )
    return Lesson(Side(model, plan.runner), teacher, loss, plan.samples, plan.division), student


def _load(checkpoint: Checkpoint, module: nn.Module | None, device: torch.device) -> nn.Module:
    """A model with its compressed layers decoded in the graph, without dropout and with fixed batch statistics."""
    loaded: nn.Module = trainable(checkpoint.path, model=module, device=device)
    return loaded.eval()


def fingerprint(plan: DistillPlan) -> str:
    """Digest of everything that decides the output's bytes: inputs, data, recipe, version, precision, file layout."""
    inputs = [
        [name, str(ref.file), ref.begin, str(ref.spec), ref.file.stat().st_mtime_ns, ref.file.stat().st_size]
        for checkpoint in (plan.checkpoint, plan.teacher)
        for name, ref in checkpoint.tensors.items()
    ]
    shards = [[shard.name, shard.nbytes, list(shard.specs)] for shard in plan.output.shards]
    whole = [__version__, plan.recipe.sha256(), plan.training.precision, plan.samples.source.sha256, inputs, shards]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _write(
    plan: DistillPlan, value_of: Callable[[str], Tensor | Weight], student: Student, writer: CheckpointWriter
) -> tuple[LayerRow, ...]:
    """Write every parameter as `value_of` gives it; a row for each layer."""
    infos: dict[str, list[Any]] = {}
    for info in plan.layers:
        infos.setdefault(info.tensor, []).append(info)
    rows: list[LayerRow] = []
    for name in plan.output.parameters:
        value = value_of(name)
        for disk, tensor in plan.output.encode(name, value).items():
            writer.put(disk, tensor)
        rows += [student.row(info, value, plan.recipe.method.name) for info in infos.get(name, [])]
    return tuple(rows)


def _facts(plan: DistillPlan, student: Student, trainer: Trainer, rows: tuple[LayerRow, ...], start: float) -> Facts:
    course = trainer.course
    warnings = list(plan.warnings)
    if course.best_step == 0:
        warnings.append("no step was better than the input on the held-out samples: the weights are the input's")
    return Facts(
        plan.recipe, plan.checkpoint, plan.kinds, rows, tuple(warnings), start, training=_training(plan, trainer)
    )


def _training(plan: DistillPlan, trainer: Trainer) -> dict[str, Any]:
    """The report's training section."""
    course, settings = trainer.course, plan.training
    seconds = course.seconds or float("inf")
    return {
        "teacher": {
            "path": str(plan.teacher.path),
            "bytes": sum(ref.spec.nbytes for ref in plan.teacher.tensors.values()),
        },
        "loss": " + ".join(f"{config.weight:g} {method.name}" for method, config in plan.losses),
        "curve": [dataclasses.asdict(point) for point in course.curve],
        "best_step": course.best_step,
        "held_out_before": course.before,
        "held_out_after": course.best,
        "held_out_samples": len(plan.division.held_out),
        "train_samples": len(plan.division.train),
        "epochs": course.samples / len(plan.division.train),
        "trained_parameters": sum(p.numel() for p in trainer.trained.parameters.values()),
        "zeros_kept": sum(int(zero.sum()) for zero in trainer.trained.zeros.values()),
        "precision": settings.precision,
        "processes": trainer.team.size,
        "cached_teacher": plan.cached,
        "samples_per_second": course.samples / seconds,
        "tokens_per_second": course.tokens / seconds if course.tokens else None,
        "seconds": course.seconds,
    }


__all__ = ["DistillPlan", "Options", "Processes", "Training", "fingerprint", "make_plan", "run"]
