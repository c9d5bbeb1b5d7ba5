"""Correct norms and biases of a student layer by layer, in closed form, with the samples of the first steps."""

from __future__ import annotations

import time
from functools import partial

from aicompress.methods.modes import LayerCorrection
from aicompress.model.blocks.paused_forward import Runs
from aicompress.model.distillation.corrections import correct, pairs
from aicompress.pipeline.distillation.loop.trainer import Trainer
from aicompress.pipeline.distillation.teachers.teacher import Teacher
from aicompress.pipeline.distillation.trained.student import Student


def correct_layers(trainer: Trainer, student: Student, config: LayerCorrection) -> None:
    """Correct every layer, and keep that if the held-out loss is lower.

    Every process runs the same samples, so that all have the same weights.
    """
    setup = trainer.setup
    assert isinstance(setup.teacher, Teacher)  # the plan takes no stored outputs for one that runs
    model, teacher = setup.student, setup.teacher.side.members[0]
    index = setup.split.first(config.samples)
    order = setup.split.in_order(index, setup.split.batch)
    batches = [setup.samples.batch(part).to(trainer.device) for part in order]
    layers = pairs(
        model.model, teacher.model, {student.places[name]: stored[""] for name, stored in student.stored.items()}
    )
    runs = [
        Runs(modules, [partial(side, batch, setup.loss.reads, "fp32") for batch in batches])
        for modules, side in (([pair.student for pair in layers], model), ([pair.teacher for pair in layers], teacher))
    ]
    masks = [batch.inputs.get("attention_mask") for batch in batches]
    history, start = trainer.history, time.perf_counter()
    trainer.measure()
    correct(layers, runs, [None if mask is None else mask.bool() for mask in masks])
    history.step, history.samples = trainer.settings.steps, len(index)
    history.seconds += time.perf_counter() - start
    trainer.measure()
    if history.best_step:
        trainer.tensors.put(trainer.tensors.best)
