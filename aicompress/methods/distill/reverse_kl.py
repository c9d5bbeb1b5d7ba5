"""Temperature-softened reverse Kullback-Leibler divergence, and cross-entropy with true labels where there are some.

    L = alpha T² KL(softmax(s/T) ‖ softmax(t/T)) + (1 - alpha) CE(s, labels)

Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", 2024, section 2.1, on given texts. A student
that cannot cover all that the teacher does settles on some of it, and gives no weight to what the teacher does not.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from aicompress.methods.distill.kl import softened_kl
from aicompress.methods.distill.logits import READS, SoftenedConfig, check_logits, with_labels
from aicompress.methods.losses import DistillMethod
from aicompress.methods.outputs import Outputs, OutputShapes, wanted


class Config(SoftenedConfig):
    """Parameters of reverse_kl."""

    name: Literal["reverse_kl"] = "reverse_kl"


def loss(student: Outputs, teacher: Outputs, config: Config) -> Tensor:
    """The loss of a batch: kl with the two in each other's place."""
    logits = wanted(student.logits, "logits")
    divergence = softened_kl(wanted(teacher.logits, "logits"), logits, config.softness)
    return with_labels(divergence, logits, student.labels, config.alpha)


def check(student: OutputShapes, teacher: OutputShapes, config: Config) -> tuple[str, str] | None:
    """Both need logits over the same classes, and labels where alpha leaves them a share."""
    return check_logits(student, teacher, config.alpha)


METHOD = DistillMethod(
    "reverse_kl", "distill", "reverse Kullback-Leibler divergence of logits (MiniLLM 2024)", Config,
    when="language models much weaker than their teacher that are to generate text; kl elsewhere", loss=loss,
    reads=READS, check=check, stored=frozenset({"top"}),
)  # fmt: skip
