"""A temperature that the recipe leaves open: the one from which the student learns most in a few steps.

Every candidate trains the student as it came for the same steps of the same batches. Losses of unlike temperatures are
no measure of each other: what counts is the divergence from the teacher at temperature 1, with the labels' share that
the loss has, on a part of the held-out samples. Nothing is drawn: equal runs choose the same.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from aicompress.measure import Counted
from aicompress.methods.distill import kl
from aicompress.methods.distill.logits import SoftenedConfig
from aicompress.pipeline.distillation.compatibility import Losses
from aicompress.pipeline.distillation.data.splits import Split
from aicompress.pipeline.distillation.loop.setup import TrainingSetup
from aicompress.pipeline.distillation.loop.state import ChosenTemperature, StateFile
from aicompress.pipeline.distillation.loop.trainer import Trainer
from aicompress.pipeline.distillation.teachers.teacher import Loss
from aicompress.pipeline.distillation.trained.optimizer import TrainedParameters
from aicompress.pipeline.step.workers import Processes
from aicompress.recipe.distillation import Training

CANDIDATES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
STEPS = 10  # of each candidate
JUDGED = 64  # held-out samples, at most


def judged(split: Split) -> Tensor:
    """The held-out samples that a temperature is chosen on: a quarter of them, spread evenly."""
    count = min(JUDGED, max(1, len(split.held_out) // 4))
    return split.held_out[torch.linspace(0, len(split.held_out) - 1, count).round().long()]


def planned(losses: Losses, split: Split) -> tuple[str, ...]:
    """What a plan says of a temperature that is chosen; nothing where the recipe gives it."""
    if not Loss(losses).leaves_open:
        return ()
    listed = ", ".join(f"{candidate:g}" for candidate in CANDIDATES)
    samples = f"{len(judged(split))} of the {len(split.held_out)} held-out samples"
    return (f"temperature: of {listed} the one that comes closest to the teacher in {STEPS} steps, on {samples}",)


def chosen(
    setup: TrainingSetup, trained: TrainedParameters, settings: Training, team: Processes,
    report: Counted,
) -> ChosenTemperature:  # fmt: skip
    """Try every candidate on the student, and leave the student as it was.

    Args:
        setup: models, losses and data.
        trained: the student's parameters.
        settings: how it will be trained.
        team: the processes that train together.
        report: called with (done, total).
    """
    index = judged(setup.split)
    start = {name: parameter.detach().clone() for name, parameter in trained.parameters.items()}
    steps = {"steps": STEPS, "evaluate_every": STEPS, "ema": None}
    short = settings.model_copy(update=steps)
    measure = _measure(setup.loss)
    tried: dict[float, float] = {}
    for number, candidate in enumerate(CANDIDATES):
        split = replace(setup.split, held_out=index)
        trial = replace(setup, loss=setup.loss.at_temperature(candidate), split=split)
        trainer = Trainer(trial, trained, short, StateFile(Path()), team)
        trainer.run(lambda what, done, total: None, save_seconds=float("inf"))
        tried[candidate] = _loss(trainer, measure, index)
        with torch.no_grad():
            for name, tensor in start.items():
                trained.parameters[name].copy_(tensor)
        report(number + 1, len(CANDIDATES))
    return ChosenTemperature(min(tried, key=lambda candidate: tried[candidate]), tried, len(index))


def _measure(loss: Loss) -> Loss:
    """What candidates are compared by: kl at temperature 1, with the labels' share of the loss."""
    share = next(config.alpha for _, config in loss.terms if isinstance(config, SoftenedConfig))
    return Loss(((kl.METHOD, kl.Config(temperature=1.0, alpha=share)),))


@torch.no_grad()
def _loss(trainer: Trainer, measure: Loss, index: Tensor) -> float:
    """The mean of a loss over some samples, in float32."""
    setup, total = trainer.setup, 0.0
    for part in setup.split.in_order(index, setup.split.batch):
        batch = setup.samples.batch(part).to(trainer.device)
        loss = measure(setup.student(batch, setup.loss.reads, "fp32"), setup.teacher(batch, "fp32"))
        total += float(loss) * len(part)
    return total / len(index)
