"""A teacher that is the exponential average of its student: how it follows, and the loss that both have together.

Tarvainen and Valpola, "Mean teachers are better role models", 2017. Everything that is drawn depends on seed, step and
place in the batch, so that a resumed run draws the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from aicompress.errors import CompressError, RecipeError, Refused
from aicompress.methods.distill.logits import cross_entropy
from aicompress.methods.outputs import Output, Outputs, OutputShapes, wanted
from aicompress.model.distillation.outputs import Runner
from aicompress.model.distillation.training_passes import Noise
from aicompress.pipeline.distillation.data.samples import Batch, TrainingSamples
from aicompress.pipeline.distillation.teachers.teacher import Loss, Runnable
from aicompress.recipe.distillation import MeanTeacher

READS: frozenset[Output] = frozenset({"logits"})  # what true labels are compared with
TOLD = "the teacher is the average of the student's weights, and the average is what is saved"


@dataclass(frozen=True)
class Averaged:
    """The average of a student in training, with a model that holds it.

    Attributes:
        settings: of the recipe.
        seed: of the recipe.
        teacher: the model that holds it.
        parameters: of the teacher's model, by the names of the student's trained ones; they are moved in place.
    """

    settings: MeanTeacher
    seed: int
    teacher: Runnable
    parameters: dict[str, Tensor]

    def follow(self, student: Mapping[str, Tensor], step: int) -> None:
        """Move the average towards the student after a step, counted from 0; at first it is a plain mean.

        The paper's a = min(1 - 1/(t + 1), decay): a teacher that starts with the student's weights forgets them soon.
        """
        decay = min(1 - 1 / (step + 2), self.settings.decay)
        for name, average in self.parameters.items():
            average.lerp_(student[name].detach(), 1 - decay)

    def loss(self, student: Runnable, loss: Loss, batch: Batch, how: tuple[str, int, float]) -> Tensor:
        """Cross-entropy with the labels that there are, and the losses between the two, each under its own noise.

        Args:
            student: the student's model.
            loss: the recipe's losses.
            batch: some samples.
            how: precision, the number of this draw, and the share of the steps that are done.
        """
        precision, draw, done = how
        noise = Noise(self.settings.dropout, self.settings.noise)
        outputs: list[Outputs] = []
        for number, side in enumerate((student, self.teacher)):
            with noise.on(side.model, batch.inputs, (self.seed << 40) + 2 * draw + number) as inputs:
                outputs.append(side(replace(batch, inputs=inputs), loss.reads | READS, precision))
        own, average = outputs
        return judged(own) + loss(own, average, done)


def problems(
    settings: MeanTeacher, run: Runner, student: OutputShapes, samples: TrainingSamples
) -> list[CompressError]:
    """What keeps a student from learning from its own average."""
    if run.task not in ("causal", "classes", "module"):
        return [Refused("mean_teacher trains classifiers and causal language models", "give another --teacher")]
    if not student.labels:
        return [RecipeError("mean_teacher learns from true labels too, and the data has none", "name data.labels")]
    if settings.noise and not any(column.is_floating_point() for column in samples.columns.values()):
        hint = "mean_teacher: {noise: 0, dropout: 0.1}"
        return [RecipeError("mean_teacher.noise is added to arrays of real numbers, and the data has none", hint)]
    return []


def judged(student: Outputs) -> Tensor:
    """Cross-entropy of a student with the true labels."""
    return cross_entropy(wanted(student.logits, "logits"), wanted(student.labels, "labels"))
