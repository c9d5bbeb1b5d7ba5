"""Wanda: the weights of least |w| √E[x²] become zero, compared within each row.

Sun et al. 2024, arXiv:2306.11695, equation 1: the score is what the layer's output loses without the weight, inputs
taken as independent. With `refit` the survivors then take their least-squares values given the Gram matrix.
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field
from torch import Tensor

from aicompress.layer import Layer
from aicompress.methods.capabilities import Reads
from aicompress.methods.curvature import importance
from aicompress.methods.decisions import Allocates
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.prune.masks.calibrated import (
    CalibratedConfig,
    check,
    describe,
    finished,
    outline,
    resolve,
)
from aicompress.methods.prune.masks.permutation import permuting
from aicompress.methods.prune.masks.sparsity import choose
from aicompress.methods.prune.masks.survey import surveying
from aicompress.weights import Weight


class WandaConfig(CalibratedConfig):
    """Parameters of wanda."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"sparsity": 0.5},
                {"sparsity": 0.5, "refit": False},
                {"sparsity": 0.75, "scope": "layer", "block": "1x4"},
                {"pattern": "2:4", "store": "sparse"},
                {"pattern": "2:4", "permutation": 5, "store": "sparse"},
                {"sparsity": 0.9, "store": "auto"},
            ]
        }
    )

    name: Literal["wanda"] = "wanda"
    scope: Literal["layer", "row"] = Field(
        "row", description="what shares a sparsity: each row of a layer, or all of it"
    )


def scores(layer: Layer, config: WandaConfig | None = None) -> Tensor:
    """w² E[x²], (out, in): the square of Wanda's score adds up over a block."""
    return layer.weight.square() * importance(layer)


def apply(layer: Layer, config: WandaConfig) -> Weight:
    """Prune one layer.

    Raises:
        CompressError: no calibration token reached the layer.
    """
    return finished(layer, choose(layer, scores(layer), config), config)


permuted = permuting(apply, scores)

METHOD = LayerMethod(
    name="wanda",
    command="prune",
    summary="zero the weights of least |w| times input norm, per row or N:M; survivors refitted",
    when="calibration text and little time; sparsegpt and alps lose less at the same zeros",
    config=WandaConfig,
    needs=frozenset({"gram"}),
    apply=permuted,
    outline=outline,
    check=check,
    allocates=Allocates(resolve),
    describe=describe,
    reading=Reads(shift=lambda config: config.shift if config.refit else 0.0),
    surveys=surveying(permuted, scores),
)
