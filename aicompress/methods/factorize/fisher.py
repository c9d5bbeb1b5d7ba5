"""Singular value decomposition with rows and columns weighted by the gradients in their weights.

Hsu et al. 2022, FWSVD, arXiv:2207.00112, weighs rows by the sums of the Fisher information F = E[g²] along them. Here
columns are weighed by theirs as well: r cᵀ / ΣF, with row sums r and column sums c, is a product near F, and with a
product the weighted least squares has a closed form. The diagonal form of two_sided.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import ConfigDict, Field

from aicompress.layer import Layer
from aicompress.methods.curvature import gradients
from aicompress.methods.factorize.weighting.roots import Root
from aicompress.methods.factorize.weighting.weighted import DampedConfig, Sides, weighted
from aicompress.methods.method import GradientLoss


class FisherConfig(DampedConfig):
    """Parameters of fisher."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"keep": 0.5}, {"energy": 0.9}, {"rank": 4}]})

    name: Literal["fisher"] = "fisher"
    loss: Literal["auto", "task", "own"] = Field(
        "own",
        description="own: gradients of labels drawn from the model's predictions, the Fisher information; task: of "
        "true labels or next tokens; auto: task where the data has them",
    )

    @property
    def gradient_loss(self) -> GradientLoss:
        return self.loss


def inputs(layer: Layer, config: FisherConfig) -> Root:
    """Roots of the column sums of the Fisher information, as shares of its sum.

    Raises:
        CompressError: there are no gradients of the layer, or they are not finite.
    """
    fisher = gradients(layer).square.double()
    total = fisher.sum().clamp_min(torch.finfo(fisher.dtype).tiny)
    return Root.diagonal(fisher.sum(dim=0) / total, config.damping)


def outputs(layer: Layer, config: FisherConfig) -> Root:
    """Roots of the row sums of the Fisher information."""
    return Root.diagonal(gradients(layer).square.double().sum(dim=1), config.damping)


METHOD = weighted(
    FisherConfig,
    Sides(inputs, outputs, shared=False),
    frozenset({"gradients"}),
    "two factors whose rows and columns count by their Fisher information; the diagonal form of two_sided; calibrated",
    when="gradients but no Gram matrices, such as those of a statistics file; two_sided loses less",
)
