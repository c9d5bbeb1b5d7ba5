"""What methods share that score weights by gradients: the loss whose gradients they read, and the way to a weight."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from aicompress.methods.method import GradientLoss
from aicompress.methods.prune.masks.calibrated import CalibratedConfig, statistics

SCALE = 2.0**60
NEEDS = frozenset({"gradients", "gram"})


class GradientConfig(CalibratedConfig):
    """Parameters of methods that know gradients, and the Gram matrix where they refit."""

    loss: Literal["auto", "task", "own"] = Field(
        "auto",
        description="whose gradients: task: of next tokens or labels; own: of labels drawn from the model's own "
        "predictions; auto: task where the data has labels or next tokens",
    )
    scope: Literal["layer", "row"] = Field("layer", description="what shares a sparsity: a layer, or each row of it")

    @property
    def gradient_loss(self) -> GradientLoss:
        return self.loss


def reads(config: GradientConfig) -> frozenset[str]:
    """Statistics that a config reads: without a refit none of the inputs."""
    return NEEDS if config.refit or config.shift else frozenset({"gradients"})


def surveyed(config: GradientConfig) -> frozenset[str]:
    """What the allocation reads: one threshold for all scores needs the gradients alone."""
    return frozenset({"gradients"}) if config.open == "global" else statistics(config)


def comparable(scores: Tensor) -> Tensor:
    """Float64 scores as float32: times one factor for all layers, so that products of small numbers do not vanish."""
    return (scores * SCALE).clamp(max=torch.finfo(torch.float32).max).float()
