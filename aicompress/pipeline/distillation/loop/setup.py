"""What a training run is given: models, loss and data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from aicompress.methods.outputs import Outputs
from aicompress.pipeline.distillation.data.samples import Batch, TrainingSamples
from aicompress.pipeline.distillation.data.splits import Split
from aicompress.pipeline.distillation.loop.shards import Shards
from aicompress.pipeline.distillation.teachers.mean_teacher import Averaged
from aicompress.pipeline.distillation.teachers.teacher import Loss, Runnable
from aicompress.pipeline.distillation.trained.recoding import Recoding


@dataclass(frozen=True)
class TrainingSetup:
    """Models, loss and data of a training run.

    Attributes:
        student: the model that is trained.
        teacher: gives what it learns from, for a batch and a precision.
        loss: distance between the two.
        samples: all of them.
        split: which are trained on, and when.
        averaged: the teacher is the student's average; None for another one.
        recoding: the student is learnt as codes, whose bits the loss pays for; None for real numbers.
        shards: what of the student is divided over the processes.
    """

    student: Runnable
    teacher: Callable[[Batch, str], Outputs]
    loss: Loss
    samples: TrainingSamples
    split: Split
    averaged: Averaged | None = None
    recoding: Recoding | None = None
    shards: Shards = field(default_factory=Shards)
