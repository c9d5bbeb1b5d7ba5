"""The loss of one sample whose gradients are taken: the task's own, or the model's against its own predictions.

With labels drawn from the model's predictive distribution the second moment of the gradient is the Fisher information
(Martens 2020, "New insights and perspectives on the natural gradient method", section 5); with true labels it is the
empirical Fisher, and the mean is what the task's loss says. A model without logits is taken for the mean of a
Gaussian of unit variance: a draw from it is an output plus white noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from aicompress.errors import Refused

LossKind = Literal["auto", "task", "own"]


@dataclass(frozen=True)
class Sample:
    """One sample, ready for a model.

    Attributes:
        number: which one it is of all processes' samples.
        inputs: keyword arguments of the model's forward: a batch of one.
        labels: (1,) int64 true class, or None.
        tokens: (1, tokens) int64 whose successors the model predicts, or None.
        weight: how often its gradient counts; 1 on average.
    """

    number: int
    inputs: dict[str, Any]
    labels: Tensor | None = None
    tokens: Tensor | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Objective:
    """Model outputs of a sample -> a scalar loss, the mean over what the model predicts for it.

    Attributes:
        kind: task: cross-entropy of next tokens or labels; own: of labels drawn from the model's predictions; auto:
            task where the sample has labels or next tokens.
        seed: of the draws; a sample's own are the same in whatever process it runs.
    """

    kind: LossKind = "auto"
    seed: int = 0

    def __call__(self, output: Any, sample: Sample) -> Tensor:
        draw = torch.Generator().manual_seed((self.seed << 24) ^ sample.number)
        logits = logits_of(output)
        if logits is None or logits.shape[-1] == 1:
            means = means_of(output) if logits is None else [logits]
            return torch.stack([_of_gaussian(mean, draw) for mean in means]).sum()
        if sample.tokens is not None:
            logits = logits[:, :-1]
        rows = logits.float().flatten(0, -2)  # (positions, classes)
        return functional.cross_entropy(rows, self._labels(rows, sample, draw))

    def _labels(self, rows: Tensor, sample: Sample, draw: torch.Generator) -> Tensor:
        known = sample.labels if sample.tokens is None else sample.tokens[:, 1:].flatten()
        if known is not None and self.kind != "own":
            return known.to(rows.device)
        predicted = rows.detach().softmax(dim=-1).cpu()
        return torch.multinomial(predicted, 1, generator=draw).flatten().to(rows.device)


def _of_gaussian(mean: Tensor, draw: torch.Generator) -> Tensor:
    """The gradient's part of the loss of a draw from a Gaussian of this mean, over its positions."""
    noise = torch.randn(mean.shape, generator=draw).to(mean.device)
    return -(mean.float() * noise).sum() / (mean.numel() / mean.shape[-1])


def logits_of(output: Any) -> Tensor | None:
    """Scores of classes or tokens; what a bare module returns is taken for them."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else None


def means_of(output: Any) -> list[Tensor]:
    """Hidden states of a model without a head; else all that it gives, such as CLIP's embeddings or a backbone's maps.

    Raises:
        Refused: it gives no real numbers.
    """
    states = getattr(output, "last_hidden_state", None)
    if isinstance(states, Tensor):
        return [states]
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    given = [each for value in values for each in (value if isinstance(value, tuple | list) else [value])]
    means = [each for each in given if isinstance(each, Tensor) and each.requires_grad]
    if not means:
        hint = "choose a method that reads no gradients"
        raise Refused(f"{type(output).__name__} holds neither logits nor states, whose loss has gradients", hint)
    return means
