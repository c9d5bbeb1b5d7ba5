"""Squared distance between the class probabilities of a student and of a teacher that see the same sample differently.

    L = mean over positions of |softmax(s) - softmax(t)|²

Tarvainen and Valpola, "Mean teachers are better role models", 2017, section 2 (equation 1): s is the student's and
t from the average of its weights, each under dropout and noise of its own; gradients flow to s alone. No labels are
needed, so unlabelled samples count as much as labelled ones. The weight rises along exp(-5 (1 - x)²) while the teacher
is still young (`ramp`).
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from aicompress.methods.distill.logits import READS, check_logits
from aicompress.methods.losses import DistillMethod, LossConfig
from aicompress.methods.outputs import Outputs, OutputShapes, wanted


class Config(LossConfig):
    """Parameters of consistency."""

    name: Literal["consistency"] = "consistency"
    ramp: float = Field(0.3, ge=0, le=1, description="share of the steps in which the weight rises to its full size")


def probability_error(student: Tensor, teacher: Tensor) -> Tensor:
    """|softmax(s) - softmax(t)|², the mean over positions; between 0 and 2.

    Args:
        student, teacher: logits (positions, classes).
    """
    difference = F.softmax(student.float(), dim=-1) - F.softmax(teacher.float(), dim=-1)
    return difference.square().sum(dim=-1).mean()


def loss(student: Outputs, teacher: Outputs, config: Config) -> Tensor:
    """The loss of a batch."""
    return probability_error(wanted(student.logits, "logits"), wanted(teacher.logits, "logits"))


def check(student: OutputShapes, teacher: OutputShapes, config: Config) -> tuple[str, str] | None:
    """Both need logits over the same classes."""
    return check_logits(student, teacher, 1.0)


METHOD = DistillMethod(
    "consistency", "distill", "squared distance of class probabilities (Tarvainen and Valpola 2017)", Config,
    when="a mean teacher: few labels and many unlabelled samples, with no teacher at hand", loss=loss,
    reads=READS, check=check,
)  # fmt: skip
