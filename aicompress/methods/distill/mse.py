"""Mean squared error of logits, and cross-entropy with true labels where there are some.

Ba and Caruana, "Do Deep Nets Really Need to be Deep?", 2014, equation 1, with the mean instead of half the sum:

    L = alpha mean((s - t)²) + (1 - alpha) CE(s, labels)

It is the limit of softened KL for high temperatures where both logits have zero mean (Hinton 2015, section 2.1).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from aicompress.methods.distill.logits import READS, check_logits, with_labels
from aicompress.methods.losses import DistillMethod, LossConfig
from aicompress.methods.outputs import Outputs, OutputShapes, wanted


class Config(LossConfig):
    """Parameters of mse."""

    name: Literal["mse"] = "mse"
    alpha: float = Field(1.0, ge=0, le=1, description="share of the teacher; the rest is cross-entropy with labels")


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """mean((s - t)²) over all elements of two tensors of one shape."""
    return (student.float() - teacher.float()).square().mean()


def loss(student: Outputs, teacher: Outputs, config: Config) -> Tensor:
    """The loss of a batch."""
    logits = wanted(student.logits, "logits")
    distance = squared_error(logits, wanted(teacher.logits, "logits"))
    return with_labels(distance, logits, student.labels, config.alpha)


def check(student: OutputShapes, teacher: OutputShapes, config: Config) -> tuple[str, str] | None:
    """Both need logits over the same classes, and labels where alpha leaves them a share."""
    return check_logits(student, teacher, config.alpha)


METHOD = DistillMethod(
    "mse", "distill", "mean squared error of logits (Ba and Caruana 2014)", Config,
    when="few classes, where the logits' own size matters; kl elsewhere", loss=loss,
    reads=READS, check=check,
)  # fmt: skip
