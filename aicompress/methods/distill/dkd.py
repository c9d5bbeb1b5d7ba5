"""Divergence of logits with what is said of the true class and of the others weighed apart.

    L = alpha T² (target KL([p, 1-p] ‖ [q, 1-q]) + others KL(p̂ ‖ q̂)) + (1 - alpha) CE(s, labels)

p and q are the softened probabilities that teacher and student give the true class, p̂ and q̂ what they give the others,
each summing to 1. Zhao et al., "Decoupled Knowledge Distillation", 2022, equation 7. In kl the second term has the
factor 1 - p (equation 5), so that a teacher that is sure of the class says little of the others. Where a sample has no
label, the teacher's most likely class stands for it.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from aicompress.methods.distill.logits import READS, UNLABELLED, SoftenedConfig, check_logits, with_labels
from aicompress.methods.losses import DistillMethod
from aicompress.methods.outputs import Outputs, OutputShapes, wanted


class Config(SoftenedConfig):
    """Parameters of dkd."""

    name: Literal["dkd"] = "dkd"
    target: float = Field(1.0, ge=0, description="factor of the divergence between true class and all others")
    others: float = Field(8.0, gt=0, description="factor of the divergence among the others")


def decoupled(student: Tensor, teacher: Tensor, classes: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """T² times the divergences of true class against others, and among the others: means over positions.

    Args:
        student, teacher: logits (positions, classes), of two or more classes.
        classes: (positions,) the true ones.
        temperature: T.
    """
    (ours, our_rest), (theirs, their_rest) = (_split(z.float() / temperature, classes) for z in (student, teacher))
    target = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    others = F.kl_div(our_rest, their_rest, reduction="batchmean", log_target=True)
    return target * temperature**2, others * temperature**2


def _split(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of true class and all others (positions, 2), and among the others (positions, classes - 1)."""
    true = F.one_hot(classes, logits.shape[-1]).bool()
    rest = logits[~true].view(len(logits), -1)
    pair = torch.stack([logits[true], rest.logsumexp(dim=-1)], dim=-1)
    return F.log_softmax(pair, dim=-1), F.log_softmax(rest, dim=-1)


def loss(student: Outputs, teacher: Outputs, config: Config) -> Tensor:
    """The loss of a batch."""
    logits, theirs = wanted(student.logits, "logits"), wanted(teacher.logits, "logits")
    classes = theirs.argmax(dim=-1)
    if student.labels is not None:
        classes = torch.where(student.labels == UNLABELLED, classes, student.labels)
    target, others = decoupled(logits, theirs, classes, config.softness)
    return with_labels(config.target * target + config.others * others, logits, student.labels, config.alpha)


def check(student: OutputShapes, teacher: OutputShapes, config: Config) -> tuple[str, str] | None:
    """Both need logits over the same classes, more than one, and labels where alpha leaves them a share."""
    if student.classes == 1:
        return "there is one class, and no other", "mse learns a single number"
    return check_logits(student, teacher, config.alpha)


METHOD = DistillMethod(
    "dkd", "distill", "true class and other classes weighed apart (Zhao 2022)", Config,
    when="classifiers with a teacher that is sure of itself; kl for language models", loss=loss,
    reads=READS, check=check, stored=frozenset({"top"}),
)  # fmt: skip
