"""Generalized Jensen-Shannon divergence of logits, and cross-entropy with true labels where there are some.

    p = softmax(t/T), q = softmax(s/T), m = beta p + (1 - beta) q
    L = alpha T² (beta KL(p ‖ m) + (1 - beta) KL(q ‖ m)) + (1 - alpha) CE(s, labels)

Agarwal et al., "On-Policy Distillation of Language Models" (GKD), 2024, equation 1, on given texts. It is never above
ln 2, however far the two are apart; its gradient is that of kl for a small beta and of reverse_kl for a large one.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from aicompress.methods.distill.logits import READS, SoftenedConfig, check_logits, with_labels
from aicompress.methods.losses import DistillMethod
from aicompress.methods.outputs import Outputs, OutputShapes, wanted


class Config(SoftenedConfig):
    """Parameters of jsd."""

    name: Literal["jsd"] = "jsd"
    beta: float = Field(0.5, gt=0, lt=1, description="share of the teacher in the mixture that both are compared with")


def softened_jsd(student: Tensor, teacher: Tensor, temperature: float, beta: float) -> Tensor:
    """T² (beta KL(p ‖ m) + (1 - beta) KL(q ‖ m)), the mean over positions, in nats.

    Args:
        student, teacher: logits (positions, classes).
        temperature: T.
        beta: share of the teacher in m.
    """
    ours = F.log_softmax(student.float() / temperature, dim=-1)
    theirs = F.log_softmax(teacher.float() / temperature, dim=-1)
    mixture = torch.logaddexp(theirs + math.log(beta), ours + math.log1p(-beta))  # (positions, classes)
    parts = [
        share * F.kl_div(mixture, side, reduction="batchmean", log_target=True)
        for share, side in ((beta, theirs), (1 - beta, ours))
    ]
    return torch.stack(parts).sum() * temperature**2


def loss(student: Outputs, teacher: Outputs, config: Config) -> Tensor:
    """The loss of a batch."""
    logits = wanted(student.logits, "logits")
    divergence = softened_jsd(logits, wanted(teacher.logits, "logits"), config.softness, config.beta)
    return with_labels(divergence, logits, student.labels, config.alpha)


def check(student: OutputShapes, teacher: OutputShapes, config: Config) -> tuple[str, str] | None:
    """Both need logits over the same classes, and labels where alpha leaves them a share."""
    return check_logits(student, teacher, config.alpha)


METHOD = DistillMethod(
    "jsd", "distill", "generalized Jensen-Shannon divergence of logits (GKD 2024)", Config,
    when="students far from their teacher, where kl is ruled by few positions", loss=loss,
    reads=READS, check=check, stored=frozenset({"top"}),
)  # fmt: skip
