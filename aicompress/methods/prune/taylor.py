"""Taylor pruning: the weights become zero whose removal changes the loss least, to first order.

Molchanov et al. 2017, arXiv:1611.06440, equation 7: zeroing w changes the mean loss by about |w E[g]|. Molchanov et al.
2019, arXiv:1906.10771, equation 8: the mean over samples of the squared change, w² E[g²], does not let the samples'
signs cancel. With `refit` the survivors then take their least-squares values given the Gram matrix.

Its parameters give two older methods. `loss: own` with `refit: false` is optimal brain damage (LeCun, Denker and Solla
1989, equation 5) with the diagonal of the Fisher information for the Hessian's (Theis et al. 2018, arXiv:1801.05787).
`moment: mean` with `allocation: global` is SNIP (Lee, Ajanthan and Torr 2019, arXiv:1810.02340, equation 6).
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field
from torch import Tensor

from aicompress.layer import Layer
from aicompress.methods.capabilities import Reads
from aicompress.methods.curvature import gradients
from aicompress.methods.decisions import Allocates
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.prune.masks.calibrated import check, describe, finished, outline, resolve
from aicompress.methods.prune.masks.gradient_scores import (
    NEEDS,
    GradientConfig,
    comparable,
    reads,
    surveyed,
)
from aicompress.methods.prune.masks.permutation import permuting
from aicompress.methods.prune.masks.sparsity import choose
from aicompress.methods.prune.masks.survey import surveying
from aicompress.weights import Weight


class TaylorConfig(GradientConfig):
    """Parameters of taylor."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"sparsity": 0.5},
                {"sparsity": 0.5, "moment": "mean", "refit": False},
                {"sparsity": 0.5, "loss": "own", "refit": False},
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


def apply(layer: Layer, config: TaylorConfig) -> Weight:
    """Prune one layer."""
    return finished(layer, choose(layer, scores(layer, config), config), config)


permuted = permuting(apply, scores)

METHOD = LayerMethod[TaylorConfig](
    name="taylor",
    command="prune",
    summary="zero the weights of least change in the loss, |weight times gradient|; survivors refitted",
    when="a loss that gradients can be taken of, and layers of unlike worth (`allocation: auto`); else alps",
    config=TaylorConfig,
    needs=NEEDS,
    apply=permuted,
    outline=outline,
    check=check,
    allocates=Allocates(resolve),
    describe=describe,
    reading=Reads(reads, lambda given: given.shift > 0),
    surveys=surveying(permuted, scores, surveyed),
)
