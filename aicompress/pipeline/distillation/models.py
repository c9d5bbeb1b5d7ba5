"""The models of a distillation as they are trained, and what the student learns from."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from aicompress.checkpoint import Checkpoint
from aicompress.methods.outputs import Output
from aicompress.model.blocks.input_errors import input_errors_refused
from aicompress.model.distillation.outputs import body_of, prepare
from aicompress.model.distillation.sharding import shard_parameters
from aicompress.model.distillation.training_passes import attend_in_float32, recompute_activations
from aicompress.model.loading.load import trainable
from aicompress.pipeline.distillation.loop.setup import TrainingSetup
from aicompress.pipeline.distillation.loop.shards import Shards, divided_student
from aicompress.pipeline.distillation.loop.state import ChosenTemperature
from aicompress.pipeline.distillation.plan import DistillPlan
from aicompress.pipeline.distillation.signals.teacher import StoredTeacher, made
from aicompress.pipeline.distillation.teachers.mean_teacher import Averaged
from aicompress.pipeline.distillation.teachers.teacher import Loss, Panel, Runnable, Teacher, with_cached_outputs
from aicompress.pipeline.distillation.temperature import chosen
from aicompress.pipeline.distillation.trained.optimizer import TrainedParameters
from aicompress.pipeline.distillation.trained.recoding import Recoding
from aicompress.pipeline.distillation.trained.student import Student
from aicompress.pipeline.step.options import Progress
from aicompress.pipeline.step.workers import Processes


def loaded(
    plan: DistillPlan, device: torch.device, team: Processes, progress: Progress
) -> tuple[TrainingSetup, Student, TrainedParameters]:
    """All models, loaded, and the teacher's outputs where they are worth keeping.

    Returns:
        Models, loss and data; the student's parameters in their stored forms, as they lie in the model; what moves.
    """
    loss, divides = Loss(plan.losses), plan.training.shard and team.size > 1
    place = torch.device("cpu") if divides else device  # a model that is divided never lies on the device as a whole
    model = _load(plan.checkpoint, plan.module_of(plan.checkpoint), place)
    complete = plan.stored is not None and plan.stored.folder is not None
    needed = () if complete else plan.teachers
    teachers = [_load(each, plan.module_of(each), place).requires_grad_(False) for each in needed]
    for each in (model, *teachers):
        prepare(each, loss.reads)
    if plan.training.precision == "bf16" and device.type == "cpu":
        attend_in_float32(model)
    if plan.training.activation_checkpointing:
        recompute_activations(model)
    student = Student.of(model, plan.checkpoint, plan.student_mode)
    trained, shards = student.trained(plan.keep_zeros), Shards()
    if divides:
        student, trained, shards, model = divided_student(student, trained, model, loss.reads, device)
    own = Runnable(model, plan.runner)
    how = zip(teachers, plan.teacher_runners, plan.numbers, strict=False)
    panel = Panel(tuple(Runnable(each, run, numbers) for each, run, numbers in how))
    averaged = _averaged(plan, panel, loss.reads, device if divides else None)
    if averaged is not None:
        panel = Panel((averaged.teacher,))
    elif divides:
        panel = _divided(plan, panel, loss.reads, device)
    first = plan.samples.batch(plan.split.train[:1]).to(device)
    with torch.no_grad(), input_errors_refused("training data"):  # a plan does not run what a factory builds
        for side in (own, *panel.members):
            side(first, loss.reads, "fp32")
    teacher = _teacher(plan, panel, loss, device, progress)
    setup = TrainingSetup(own, teacher, loss, plan.samples, plan.split, averaged, shards=shards)
    recodes = plan.student_mode.mode.recodes
    if recodes is None:
        return setup, student, trained
    recoding = Recoding.of(student, model, recodes, plan.recipe.seed)
    return replace(setup, recoding=recoding), student, recoding.trained(student, plan.keep_zeros)


def _teacher(
    plan: DistillPlan, panel: Panel, loss: Loss, device: torch.device, progress: Progress
) -> Teacher | StoredTeacher:
    """What gives the outputs that are learnt from: a folder of them, or the teachers, with what is cached of these."""
    if plan.stored is not None and plan.stored.folder is not None:
        return StoredTeacher(plan.stored, plan.stored.folder)
    teacher = Teacher(panel, loss.reads, {}, torch.full((len(plan.samples),), -1))
    if not len(plan.cached):
        return teacher
    batches = plan.split.in_order(plan.cached, plan.training.batch)
    told = progress if plan.caches_training else lambda what, done, total: None  # it takes no longer than a measurement
    report = partial(_of_teacher, told, len(plan.cached))
    return with_cached_outputs(teacher, plan.samples, batches, device, report)


def _divided(plan: DistillPlan, panel: Panel, reads: frozenset[Output], device: torch.device) -> Panel:
    """Teachers divided over the processes; whole ones where each process stores the outputs for samples of its own."""

    def placed(model: nn.Module) -> nn.Module:
        return shard_parameters(model, body_of(model, reads), device) if plan.stored is None else model.to(device)

    return Panel(tuple(replace(member, model=placed(member.model)) for member in panel.members))


def at_temperature(
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


def with_stored(
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


def _averaged(
    plan: DistillPlan, panel: Panel, reads: frozenset[Output], divided_on: torch.device | None
) -> Averaged | None:
    """The average of the student in the teacher's model; None where the teacher is another checkpoint.

    Args:
        plan: of the run.
        panel: the teacher.
        reads: outputs that are read of it.
        divided_on: where the model runs, divided over the processes as the student is; None where it is whole.
    """
    settings = plan.recipe.mean_teacher
    if settings is None:
        return None
    teacher = panel.members[0]
    alike = Student.of(teacher.model, plan.checkpoint, plan.student_mode)
    trained = alike.trained(keep_zeros=False)
    teacher.model.requires_grad_(False)
    if divided_on is not None:
        _, trained, _, model = divided_student(alike, trained, teacher.model, reads, divided_on)
        teacher = replace(teacher, model=model)
    tensors = {name: tensor.detach() for name, tensor in trained.parameters.items()}
    return Averaged(settings, plan.recipe.seed, teacher, tensors)


def _load(checkpoint: Checkpoint, module: nn.Module | None, device: torch.device) -> nn.Module:
    """A model with its compressed layers decoded in the graph, without dropout and with fixed batch statistics."""
    loaded: nn.Module = trainable(checkpoint, model=module, device=device)
    return loaded.eval()


def _of_teacher(progress: Progress, samples: int, done: int) -> None:
    progress("teacher", done, samples)
