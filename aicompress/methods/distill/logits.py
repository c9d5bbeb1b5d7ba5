"""What the losses on logits share: the mix with labels, and which pairs of models they fit."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import torch.nn.functional as F
from pydantic import BeforeValidator, Field
from torch import Tensor

from aicompress.methods.losses import LossConfig
from aicompress.methods.outputs import Output, OutputShapes, wanted

READS: frozenset[Output] = frozenset({"logits"})
UNLABELLED = -1  # in the place of a label that is not known


def _temperature(given: Any) -> Any:
    """A positive number, two of them, or auto."""
    if given == "auto":
        return given
    numbers = list(given) if isinstance(given, list | tuple) and len(given) == 2 else [given]
    if any(type(number) not in (int, float) or not 0 < number < float("inf") for number in numbers):
        hint = "[4, 1] goes from one to the other over the steps; or auto"
        raise ValueError(f"give a number above 0, or two of them: {hint}")
    return given


Temperature = Annotated[float | tuple[float, float] | Literal["auto"], BeforeValidator(_temperature)]


class SoftenedConfig(LossConfig):
    """What the parameters of losses on softened logits hold."""

    temperature: Temperature = Field(
        2.0,
        description="T: softens both distributions; 1 leaves them as they are; [4, 1] goes from 4 to 1 over the steps; "
        "auto: the one from which the student learns most in a few steps, judged on held-out samples",
    )
    alpha: float = Field(1.0, ge=0, le=1, description="share of the teacher; the rest is cross-entropy with labels")

    def at(self, done: float) -> Self:
        """The same with the temperature that holds when a share of the steps is done.

        Jafari et al., "Annealing Knowledge Distillation", 2021, lower it in as even steps.
        """
        if not isinstance(self.temperature, tuple):
            return self
        first, last = self.temperature
        return self.model_copy(update={"temperature": first + (last - first) * done})

    @property
    def leaves_open(self) -> bool:
        """Whether the temperature is chosen before training."""
        return self.temperature == "auto"

    def softened(self, temperature: float) -> Self:
        """The same with a temperature where it is left open."""
        return self.model_copy(update={"temperature": temperature}) if self.leaves_open else self

    @property
    def softness(self) -> float:
        """The temperature; the last one of a schedule.

        Raises:
            ValueError: it is not chosen yet.
        """
        if isinstance(self.temperature, str):
            raise ValueError("the temperature is not chosen yet")
        return self.temperature[1] if isinstance(self.temperature, tuple) else self.temperature


def with_labels(distance: Tensor, logits: Tensor, labels: Tensor | None, alpha: float) -> Tensor:
    """alpha * distance + (1 - alpha) * cross-entropy, the mean over positions.

    Args:
        distance: scalar distance to the teacher.
        logits: the student's, (positions, classes).
        labels: (positions,) int64, -1 where it is not known; not read where alpha is 1.
    """
    if alpha == 1:
        return distance
    return alpha * distance + (1 - alpha) * cross_entropy(logits, wanted(labels, "labels"))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with true labels, the mean over all positions: those without a label add nothing.

    Args:
        logits: (positions, classes).
        labels: (positions,) int64, -1 where it is not known.
    """
    if bool((labels != UNLABELLED).all()):
        return F.cross_entropy(logits.float(), labels)
    return F.cross_entropy(logits.float(), labels, ignore_index=UNLABELLED, reduction="sum") / len(labels)


def check_logits(student: OutputShapes, teacher: OutputShapes, alpha: float) -> tuple[str, str] | None:
    """What keeps a student's logits from being compared with a teacher's, as (message, hint), or None."""
    if student.classes is None or teacher.classes is None:
        which = "student" if student.classes is None else "teacher"
        return f"the {which} gives no logits", "an encoder is distilled by embedding, hidden or relation"
    alike = student.tokenizer is not None and student.tokenizer == teacher.tokenizer  # padded to different sizes
    if student.classes != teacher.classes and not alike:
        sizes = f"{student.classes} classes and the teacher {teacher.classes}"
        return f"the student's logits have {sizes}", "distil between models of one vocabulary, or one set of classes"
    if alpha < 1 and not student.labels:
        return f"alpha {alpha:g} needs labels, and the data has none", "name data.labels, or set method.alpha: 1.0"
    return None
