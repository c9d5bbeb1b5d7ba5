"""The trained parameters of a student, the optimizer that moves them, and its rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from aicompress.recipe.distillation import Training


@dataclass(frozen=True)
class TrainedParameters:
    """The trained parameters of a student.

    Attributes:
        parameters: by name.
        dtypes: what each is stored as; held-out losses are measured on weights rounded to it.
        zeros: True where a weight must stay zero.
        scales: root mean square of quantization scales, by name: their learning rate is relative to it.
        latent: the step of its grid, by name, of numbers in the place of codes.
        code_rate: (steps) -> how far the first steps of a training move a code, in steps of its grid.
    """

    parameters: dict[str, Tensor]
    dtypes: Mapping[str, torch.dtype]
    zeros: Mapping[str, Tensor]
    scales: Mapping[str, float]
    latent: Mapping[str, float]
    code_rate: Callable[[int], float]


def rate(step: int, settings: Training) -> float:
    """Factor of the learning rate at a step, counted from 0: linear warm-up, then half a cosine down to 0.

    Loshchilov and Hutter, "SGDR", 2017, equation 5, with one period.
    """
    warmup = round(settings.warmup * settings.steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (settings.steps - warmup)))


def optimizer(trained: TrainedParameters, settings: Training) -> torch.optim.AdamW:
    """AdamW: matrices decay, a scale's rate is relative to its size, and latent numbers have a rate of their own.

    A rate of 3e-4 would ruin a scale of 0.01, and move no code within a thousand steps.
    """
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    own: list[dict[str, object]] = []
    for name, parameter in trained.parameters.items():
        if name in trained.latent:
            far = trained.code_rate(settings.steps) * trained.latent[name]
            own.append({"params": [parameter], "peak": far, "weight_decay": 0.0})
        elif name in trained.scales:
            far = settings.learning_rate * trained.scales[name]
            own.append({"params": [parameter], "peak": far, "weight_decay": 0.0})
        else:
            (decayed if parameter.ndim >= 2 or name.endswith("_values") else plain).append(parameter)
    peak = settings.learning_rate
    matrices = {"params": decayed, "peak": peak, "weight_decay": settings.weight_decay}
    vectors = {"params": plain, "peak": peak, "weight_decay": 0.0}
    groups = [group for group in (matrices, vectors, *own) if group["params"]]
    return torch.optim.AdamW(groups, lr=peak, fused=True)
