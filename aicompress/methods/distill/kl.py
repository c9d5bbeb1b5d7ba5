"""Temperature-softened Kullback-Leibler divergence, and cross-entropy with true labels where there are some.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2:

    L = alpha T² KL(softmax(t/T) ‖ softmax(s/T)) + (1 - alpha) CE(s, labels)

T² undoes the factor 1/T² that softening puts on the gradient, so that alpha means the same at every temperature.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from aicompress.methods.distill.logits import READS, SoftenedConfig, check_logits, with_labels
from aicompress.methods.outputs import Anatomy, Outputs, wanted
from aicompress.methods.training import DistillMethod


class Config(SoftenedConfig):
    """Parameters of kl."""

    name: Literal["kl"] = "kl"


def softened_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² KL(teacher ‖ student), the mean over positions, in nats.

    Args:
        student, teacher: logits (positions, classes).
        temperature: T.
    """
    log_student = F.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def loss(student: Outputs, teacher: Outputs, config: Config) -> Tensor:
    """The loss of a batch."""
    logits = wanted(student.logits, "logits")
    divergence = softened_kl(logits, wanted(teacher.logits, "logits"), config.softness)
    return with_labels(divergence, logits, student.labels, config.alpha)


def check(student: Anatomy, teacher: Anatomy, config: Config) -> tuple[str, str] | None:
    """Both need logits over the same classes, and labels where alpha leaves them a share."""
    return check_logits(student, teacher, config.alpha)


METHOD = DistillMethod(
    "kl", "distill", "softened Kullback-Leibler divergence of logits (Hinton 2015)", Config,
    when="models with logits: language models and classifiers, after any step that cost quality", loss=loss,
    reads=READS, check=check, stored=frozenset({"top", "drawn"}),
)  # fmt: skip
