"""Taylor pruning: the weights become zero whose removal changes the loss least, to first order.

Molchanov et al. 2017, arXiv:1611.06440, equation 7: zeroing w changes the mean loss by about |w E[g]|. Molchanov et al.
2019, arXiv:1906.10771, equation 8: the mean over samples of the squared change, w² E[g²], does not let the samples'
signs cancel. With `refit` the survivors then take their least-squares values given the Gram matrix.
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field
from torch import Tensor

from aicompress.layer import Layer
from aicompress.methods.curvature import gradients
from aicompress.methods.prune.masks.gradient_method import differentiated
from aicompress.methods.prune.masks.gradient_scores import GradientConfig, comparable


class TaylorConfig(GradientConfig):
    """Parameters of taylor."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"sparsity": 0.5},
                {"sparsity": 0.5, "moment": "mean", "refit": False},
                {"sparsity": 0.75, "scope": "row", "block": "1x4"},
                {"pattern": "2:4", "store": "sparse"},
            ]
        }
    )

    name: Literal["taylor"] = "taylor"
    moment: Literal["square", "mean"] = Field(
        "square", description="square: the mean of every sample's squared change; mean: the change of the mean loss"
    )


def scores(layer: Layer, config: TaylorConfig) -> Tensor:
    """w² E[g²] or (w E[g])², (out, in): squares add up over a block."""
    moments = gradients(layer)
    second = moments.square if config.moment == "square" else moments.mean.double().square()
    return comparable(layer.weight.double().square() * second)


METHOD = differentiated(
    TaylorConfig,
    scores,
    "zero the weights of least change in the loss, |weight times gradient|; survivors refitted",
    when="a loss that gradients can be taken of, and layers of unlike worth (`allocation: auto`); else alps",
)
