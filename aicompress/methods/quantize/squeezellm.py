"""Weight sharing by k-means that weighs every input by its mean square: least Σ_j E[x_j²] (w_j − ŵ_j)².

Kim et al. 2024, "SqueezeLLM", arXiv:2306.07629, section 4.1, with the diagonal of the Gram matrix of the inputs in the
place of the Fisher information, which needs gradients; without its separate outliers.
"""

from __future__ import annotations

from typing import Literal

from aicompress.layer import Layer
from aicompress.methods.curvature import importance
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.quantize.grid.integer import check
from aicompress.methods.quantize.grid.rounding import EPSILON
from aicompress.methods.quantize.kmeans import CodebookConfig, describe, outline, shared_values
from aicompress.weights import Weight


class SqueezellmConfig(CodebookConfig):
    """Parameters of squeezellm."""

    name: Literal["squeezellm"] = "squeezellm"


def apply(layer: Layer, config: SqueezellmConfig) -> Weight:
    """Quantize one layer.

    Raises:
        CompressError: no calibration token reached the layer, or its inputs are not finite.
        Refused: its values are too large for the tables' dtype.
    """
    squares = importance(layer)
    return shared_values(layer, squares.clamp_min(1e-3 * squares.mean() + EPSILON), config)


METHOD = LayerMethod(
    name="squeezellm",
    command="quantize",
    summary="nearest of 2^bits values found by k-means weighted by the inputs; calibrated",
    when="as kmeans, where there is calibration text: errors count by what the inputs make of them",
    config=SqueezellmConfig,
    needs=frozenset({"norms"}),
    apply=apply,
    outline=outline,
    check=check,
    describe=describe,
)
