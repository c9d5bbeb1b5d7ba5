"""Temperature-softened Kullback-Leibler divergence, and cross-entropy with true labels where there are some.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2:

    L = alpha T² KL(softmax(t/T) ‖ softmax(s/T)) + (1 - alpha) CE(s, labels)

T² undoes the factor 1/T² that softening puts on the gradient, so that alpha means the same at every temperature.

Where only the k most likely classes of a teacher were stored, the divergence is that of k + 1 classes, the last of
which is all others together; where classes were drawn, it is that from the shares of the draws. No logits of the
teacher are made up for it (`known_kl`).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from aicompress.methods.distill.logits import READS, SoftenedConfig, check_logits, with_labels
from aicompress.methods.losses import DistillMethod
from aicompress.methods.outputs import KnownClasses, Outputs, OutputShapes, wanted


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


ROWS = 128  # positions at a time: their probabilities stay in the processor's cache


class _KnownKL(torch.autograd.Function):
    """The divergence with its gradient, which is made along with it: all classes are passed over once."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        classes: Tensor,
        log_p: Tensor,
        times: Tensor,
        rest: Tensor,
        temperature: float,
    ) -> Tensor:
        """The value of `known_kl`, ()."""
        needed = ctx.needs_input_grad[0]
        gradient = torch.empty_like(logits) if needed else None
        factor = temperature**2 / len(logits)
        tiny, total = torch.finfo(torch.float32).tiny, logits.new_zeros((), dtype=torch.float32)
        for first in range(0, len(logits), ROWS):
            here = slice(first, first + ROWS)
            soft = logits[here] if temperature == 1 else logits[here].float() / temperature
            q = torch.softmax(soft, dim=-1, dtype=torch.float32)
            q_known = q.gather(1, classes[here])
            q.scatter_(1, classes[here], 0.0)
            q_rest = q.sum(dim=-1).clamp_(min=tiny)
            p, p_rest = log_p[here].exp(), rest[here].exp()
            total += (p / times[here] * (log_p[here] - q_known.clamp(min=tiny).log())).sum()
            total += (p_rest * (rest[here] - q_rest.log())).sum()
            if gradient is not None:  # q - p, where p is shared among the others in the proportions of q
                q.mul_(((1 - p_rest / q_rest) * (factor / temperature))[:, None])
                gradient[here] = q.scatter_(1, classes[here], (q_known - p) * (factor / temperature))
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total * factor

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the logits alone."""
        (gradient,) = ctx.saved_tensors
        return gradient if float(above[0]) == 1 else gradient * above[0], None, None, None, None, None


def known_kl(student: Tensor, known: KnownClasses) -> Tensor:
    """T² KL(teacher ‖ student) over known classes and all others together, the mean over positions, in nats.

    Args:
        student: logits (positions, classes).
        known: of the same classes, with probabilities at temperature T.
    """
    shares = torch.cat([known.log_probabilities - known.times.log(), known.rest[:, None]], dim=1)
    whole = shares.logsumexp(dim=-1)  # stored in half precision, their sum is not quite 1
    log_p, rest = known.log_probabilities - whole[:, None], known.rest - whole
    divergence: Tensor = _KnownKL.apply(student, known.classes, log_p, known.times, rest, known.temperature)  # type: ignore[no-untyped-call]
    return divergence


def loss(student: Outputs, teacher: Outputs, config: Config) -> Tensor:
    """The loss of a batch."""
    logits = wanted(student.logits, "logits")
    if teacher.known_classes is not None:
        divergence = known_kl(logits, teacher.known_classes)
    else:
        divergence = softened_kl(logits, wanted(teacher.logits, "logits"), config.softness)
    return with_labels(divergence, logits, student.labels, config.alpha)


def check(student: OutputShapes, teacher: OutputShapes, config: Config) -> tuple[str, str] | None:
    """Both need logits over the same classes, and labels where alpha leaves them a share."""
    return check_logits(student, teacher, config.alpha)


METHOD = DistillMethod(
    "kl", "distill", "softened Kullback-Leibler divergence of logits (Hinton 2015)", Config,
    when="models with logits: language models and classifiers, after any step that cost quality", loss=loss,
    reads=READS, check=check, stored=frozenset({"top", "drawn"}), from_known=True,
)  # fmt: skip
