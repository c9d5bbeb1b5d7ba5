"""SNIP: the connections that one batch's loss is least sensitive to become zero, under one threshold for all layers.

Lee, Ajanthan and Torr 2019, arXiv:1810.02340, equation 6: |g w| over its sum, with the gradient of the loss of one
batch, here the calibration samples; the normalization does not change the order. With `refit` the survivors then take
their least-squares values given the Gram matrix.
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field
from torch import Tensor

from aicompress.layer import Layer
from aicompress.methods.curvature import gradients
from aicompress.methods.prune.masks.gradient_method import differentiated
from aicompress.methods.prune.masks.gradient_scores import GradientConfig, comparable


class SnipConfig(GradientConfig):
    """Parameters of snip."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"sparsity": 0.5, "allocation": "uniform"},
                {"sparsity": 0.5, "allocation": "uniform", "scope": "row", "refit": False},
                {"sparsity": 0.75, "allocation": "uniform", "block": "4x1"},
                {"pattern": "2:4", "allocation": "uniform", "store": "sparse"},
            ]
        }
    )

    name: Literal["snip"] = "snip"
    allocation: Literal["uniform", "global", "owl", "auto"] = Field(
        "global",
        description="how layers share the sparsity: global, one threshold for all scores, as in the paper; see wanda",
    )


def scores(layer: Layer, config: SnipConfig) -> Tensor:
    """|g w|, (out, in)."""
    return comparable((layer.weight.double() * gradients(layer).mean).abs())


METHOD = differentiated(
    SnipConfig,
    scores,
    "zero the weights to which one batch's loss is least sensitive, under one threshold; survivors refitted",
    when="a network that will be trained on with its zeros; without training taylor loses less than half as much",
)
