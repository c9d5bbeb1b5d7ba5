"""Forms in which a teacher's logits are stored: every class, the most likely ones, or some that are drawn.

    every      all logits, as they are
    top        log p of the k most likely classes, and the log of what all others have together
    drawn      k classes drawn from p, with replacement

p = softmax(t/T). The probability that `top` leaves over is shared among the other classes as the student shares it: a
divergence is then that of k + 1 classes, the last of which is all others together, and pulls at nothing among them. In
equal parts it would pull every student towards a flat tail. A drawn class counts 1/k as often as it was drawn, so that
the expectation of what is stored is p itself, and that of a loss that is linear in p is exact too (Anshumann et al.,
"Sparse Logit Sampling", 2025, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from aicompress.methods.outputs import KnownClasses, Outputs

Form = Literal["every", "top", "drawn"]
NONE = -1e4  # the logarithm of a probability that is counted as none: exp gives an exact zero


def stored_logits(form: Form, logits: Tensor, k: int, temperature: float, draws: torch.Generator) -> dict[str, Tensor]:
    """Logits in a stored form, by the names of its tensors, on the CPU.

    Args:
        form: which.
        logits: (positions, classes).
        k: classes kept, or drawn.
        temperature: T; `every` reads none.
        draws: of `drawn`, on the CPU.
    """
    if form == "every":
        return {"logits": logits.float().cpu()}
    log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
    if form == "drawn":
        drawn = torch.multinomial(log_p.exp().cpu(), k, replacement=True, generator=draws)
        return {"classes": drawn.to(class_dtype(logits.shape[-1]))}
    values, classes = log_p.topk(k, dim=-1)
    rest = log_p.scatter(1, classes, float("-inf")).logsumexp(dim=-1)
    return {
        "classes": classes.cpu().to(class_dtype(logits.shape[-1])),
        "log_probabilities": values.clamp(min=NONE).half().cpu(),
        "rest": rest.clamp(min=NONE).half().cpu(),
    }


def outputs_of(form: Form, stored: Mapping[str, Tensor], classes: int, temperature: float) -> Outputs:
    """What a stored form says of a teacher: logits (positions, classes), or the classes that were kept or drawn.

    Args:
        form: which.
        stored: its tensors by name.
        classes: how many there are.
        temperature: T, as when they were stored; softmax(logits / T) is what is known.
    """
    if form == "every":
        return Outputs(logits=stored["logits"])
    kept = stored["classes"].long()  # (positions, k)
    if form == "drawn":
        times = repeats(kept).float()
        rest = times.new_full((len(kept),), NONE)
        return Outputs(
            known_classes=KnownClasses(kept, (times / kept.shape[1]).log(), times, rest, temperature, classes)
        )
    log_p, rest = stored["log_probabilities"].float(), stored["rest"].float()
    return Outputs(known_classes=KnownClasses(kept, log_p, torch.ones_like(log_p), rest, temperature, classes))


def repeats(classes: Tensor) -> Tensor:
    """How often each class is among those of its position, (positions, k) int64.

    Args:
        classes: (positions, k) int64.
    """
    ordered, places = classes.sort(dim=1)
    run = torch.zeros_like(ordered)  # the number of its run of equal classes
    run[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(dim=1)
    lengths = torch.zeros_like(run).scatter_add_(1, run, torch.ones_like(run))
    return torch.empty_like(run).scatter_(1, places, lengths.gather(1, run))


@torch.no_grad()
def completed(known: KnownClasses, student: Tensor) -> Tensor:
    """The teacher's logits (positions, classes), those of unknown classes in the student's proportions.

    Args:
        known: some classes.
        student: logits (positions, its classes), of which it may have fewer or more.
    """
    same = student[:, : known.of].float() / known.temperature
    same = F.pad(same, (0, known.of - same.shape[1]), value=NONE)
    others = same.scatter(1, known.classes, float("-inf"))
    log_p = known.rest[:, None] + torch.log_softmax(others, dim=-1)
    return log_p.scatter_(1, known.classes, known.log_probabilities).clamp_(min=NONE) * known.temperature


def position_bytes(form: Form, classes: int, k: int) -> int:
    """Bytes that one position takes."""
    if form == "every":
        return 4 * classes
    number = torch.empty(0, dtype=class_dtype(classes)).element_size()
    return k * number if form == "drawn" else k * (number + 2) + 2


def class_dtype(classes: int) -> torch.dtype:
    """The smallest integers that number the classes."""
    return torch.uint16 if classes <= 1 << 16 else torch.int32


def words(form: Form, k: int, classes: int) -> str:
    """A form, for people."""
    named: dict[Any, str] = {
        "every": f"all {classes:,} logits",
        "top": f"the {k} most likely of {classes:,} classes",
        "drawn": f"{k} draws from {classes:,} classes",
    }
    return named[form]
