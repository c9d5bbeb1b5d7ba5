"""Factors of the least loss, as far as curvature in the layer's inputs and outputs tells it.

The loss of an error E in a weight is about ½ tr(G E H Eᵀ) with H = E[x xᵀ] of the layer's inputs and G = Σ d dᵀ of the
gradients d in its outputs, the Kronecker-factored Fisher information (Martens and Grosse 2015, arXiv:1503.05671,
section 3). With H = S Sᵀ and G = Mᵀ M the best factors of rank r have M U V S = SVD_r(M W S), and Σ_{i>r} σ_i² is in
units of loss: one factor makes it nats, for all layers the same. So ranks can be shared out over layers by it.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import ConfigDict, Field, model_validator

from aicompress.errors import CompressError
from aicompress.layer import Layer
from aicompress.methods.curvature import gradients, raw_gram
from aicompress.methods.factorize.weighting.roots import Root
from aicompress.methods.factorize.weighting.weighted import EFFORTS, AnchoredConfig, Sides, shift_of, weighted
from aicompress.methods.method import GradientLoss


class TwoSidedConfig(AnchoredConfig):
    """Parameters of two_sided."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"keep": 0.5},
                {"keep": 0.5, "ranks": "auto"},
                {"rank": 3, "shift": 0.0, "loss": "task"},
                {"energy": 0.9, "output_damping": 0.0},
            ]
        }
    )

    name: Literal["two_sided"] = "two_sided"
    ranks: Literal["uniform", "auto"] = Field(
        "uniform",
        description="keep: the share of every layer, or auto: of all layers together, ranks where they lose least",
    )
    output_damping: float = Field(
        0.3, ge=0, le=1, description="added to the Gram matrix of output gradients, as a part of its mean diagonal"
    )
    loss: Literal["auto", "task", "own"] = Field(
        "own",
        description="own: gradients of labels drawn from the model's predictions, the Fisher information; task: of "
        "true labels or next tokens; auto: task where the data has them",
    )

    @model_validator(mode="after")
    def _auto_shares_out_keep(self) -> TwoSidedConfig:
        if self.ranks == "auto" and self.keep is None:
            raise ValueError("ranks: auto shares out `keep`; energy and target_bytes do so by themselves")
        return self

    @property
    def by_spectrum(self) -> bool:
        return super().by_spectrum or (self.ranks == "auto" and self.keep is not None)

    @property
    def gradient_loss(self) -> GradientLoss:
        return self.loss


def inputs(layer: Layer, config: TwoSidedConfig) -> Root:
    """S of the Gram matrix of a layer's inputs.

    Raises:
        CompressError: no calibration token reached the layer, or its inputs are not finite.
    """
    return Root.of(raw_gram(layer), config.damping)


def outputs(layer: Layer, config: TwoSidedConfig) -> Root | None:
    """Mᵀ of the Gram matrix of the gradients in a layer's outputs; None where no gradient reaches it.

    Of experts in one tensor no outputs are seen. With inputs that are independent of the gradients, E[g²] of a row's
    weights adds up to d² of its output times ‖x‖², which gives the diagonal.

    Raises:
        CompressError: they are not finite.
    """
    if not reached(layer):
        return None
    gram = None if layer.gradients is None else layer.gradients.output_gram
    if gram is None:
        squares = gradients(layer).square
        return Root.diagonal(squares.sum(dim=1) / raw_gram(layer).diagonal().sum(), config.output_damping)
    if not torch.isfinite(gram).all():
        raise CompressError(f"{layer.info.name}: its gradients hold NaN or infinity", "calibrate on other data")
    return Root.of(gram, config.output_damping)


def reached(layer: Layer) -> bool:
    """Whether gradients reach a layer; of one that they do not reach all weights count alike, in no unit of loss."""
    if layer.gradients is not None and layer.gradients.output_gram is not None:
        return bool(layer.gradients.output_gram.any())
    mean, square = gradients(layer)
    return not torch.equal(mean, square)  # flat moments, or zero ones


METHOD = weighted(
    TwoSidedConfig,
    Sides(inputs, outputs, shift_of, comparable=reached, efforts=EFFORTS),
    frozenset({"gram", "output_gram"}),
    "the two factors of least loss, by inputs and output gradients; by rank, energy, share or bytes; calibrated",
    when="low rank with the least divergence at its bytes, for one backward pass more than whitened",
)
