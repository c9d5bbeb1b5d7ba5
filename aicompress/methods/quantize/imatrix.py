"""Round to nearest with scales that weigh each input by its mean square: least Σ_j E[x_j²] (w_j − ŵ_j)².

The diagonal of the Gram matrix is the importance matrix of llama.cpp (pull request 4861); scales are searched and
fitted as in its quantizers and in AutoRound's imatrix mode (arXiv:2309.05516).
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict

from aicompress.layer import Layer
from aicompress.methods.curvature import importance
from aicompress.methods.decisions import Allocates
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.quantize.grid.integer import (
    IntegerConfig,
    check,
    describe,
    encoded,
    outline,
    resolve,
    searched,
    sketched,
    stored_scale_dtype,
)
from aicompress.methods.quantize.grid.scales import least_error
from aicompress.weights import Weight


class ImatrixConfig(IntegerConfig):
    """Parameters of imatrix."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"bits": 4, "group_size": 4}, {"granularity": "tensor"}]})

    name: Literal["imatrix"] = "imatrix"


def apply(layer: Layer, config: ImatrixConfig) -> Weight:
    """Quantize one layer.

    Raises:
        CompressError: no calibration token reached the layer, or its inputs are not finite.
        Refused: its values are too large for the scales' dtype.
    """
    dtype = stored_scale_dtype(config, layer.info.dtype)
    return encoded(layer.info, layer.weight, config, *least_error(layer.weight, importance(layer), config, dtype))


METHOD = LayerMethod(
    name="imatrix",
    command="quantize",
    summary="round to nearest, scales of least error weighted by the inputs; calibrated",
    when="calibration text, but not the memory or time of gptq's Gram matrices: one number an input is kept",
    config=ImatrixConfig,
    needs=frozenset({"norms"}),
    apply=apply,
    outline=outline,
    check=check,
    allocates=Allocates(resolve),
    widths=searched(ImatrixConfig, sketched),
    describe=describe,
)
