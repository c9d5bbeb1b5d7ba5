"""Fisher pruning, optimal brain damage: the weights become zero whose removal costs least to second order.

LeCun, Denker and Solla 1989, equation 5: the saliency 1/2 h_kk w² of a weight at a minimum of the loss, with a diagonal
Hessian; here its diagonal is that of the Fisher information, E[g²] for labels drawn from the model's own predictions
(Theis et al. 2018, arXiv:1801.05787, equation 6). Survivors keep their values, as in the paper, unless `refit` is set.
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field
from torch import Tensor

from aicompress.layer import Layer
from aicompress.methods.curvature import gradients
from aicompress.methods.prune.masks.gradient_method import differentiated
from aicompress.methods.prune.masks.gradient_scores import GradientConfig, comparable


class FisherConfig(GradientConfig):
    """Parameters of fisher."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"sparsity": 0.5},
                {"sparsity": 0.5, "scope": "row", "loss": "task", "refit": True},
                {"sparsity": 0.75, "block": "4x1"},
                {"pattern": "2:4", "store": "sparse"},
            ]
        }
    )

    name: Literal["fisher"] = "fisher"
    loss: Literal["auto", "task", "own"] = Field(
        "own",
        description="own: labels drawn from the model's predictions, the Fisher information; task: true labels or next "
        "tokens, the empirical one; auto: task where the data has them",
    )
    refit: bool = Field(False, description="give the survivors their least-squares values; needs inputs, too")


def scores(layer: Layer, config: FisherConfig) -> Tensor:
    """w² E[g²] / 2, (out, in)."""
    return comparable(0.5 * layer.weight.double().square() * gradients(layer).square)


METHOD = differentiated(
    FisherConfig,
    scores,
    "zero the weights of least w² times Fisher information (optimal brain damage)",
    when="survivors that have to keep their values exactly; with refitted ones taylor and sparsegpt lose half as much",
)
