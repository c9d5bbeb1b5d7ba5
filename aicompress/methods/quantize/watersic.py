"""WaterSIC: a step of its own for every column, so that all of them add as much to the error, entropy-coded.

The authors' code (egorlifar/watersic, ICML 2026): columns are rounded in turn with feedback, as in gptq, and the step
of column i is proportional to C_ii, where H⁻¹ = Cᵀ C: it is coarse where errors cost little, which is waterfilling.
Then factors of rows and columns are fitted by least squares, in turns. Codes are coded in buckets of columns alike in
spread, where the authors count one entropy for all.
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from aicompress.layer import Layer, LayerInfo
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.quantize.entropy_gptq import ordered
from aicompress.methods.quantize.grid.rated import (
    Problem,
    RatedConfig,
    bits_of_codes,
    check,
    describe,
    rated_codes,
    stored,
)
from aicompress.methods.quantize.grid.rated import outline as outline_of
from aicompress.methods.quantize.grid.refitting import refitted
from aicompress.weights import Weight


class WatersicConfig(RatedConfig):
    """Parameters of watersic."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"target_bpw": 2.0, "rate": 0.0}]})

    name: Literal["watersic"] = "watersic"
    damping: float = Field(0.01, gt=0, le=1, description="added to the Gram matrix, as a part of its mean diagonal")


def apply(layer: Layer, config: WatersicConfig) -> Weight:
    """Quantize one layer.

    Raises:
        CompressError: no calibration token reached the layer, or its Gram matrix is not one.
    """
    order, coupling, pivots, hessian = ordered(layer, False, config.damping)
    wanted = layer.weight.t()[order].contiguous()
    profile = pivots / pivots.log().mean().exp()
    problem = Problem(wanted, coupling, profile.pow(-2), profile)
    rated = rated_codes(problem, bits_of_codes(layer.info, config, True), config)
    rows, columns = refitted(wanted, hessian, rated.values, True)
    size = rated.steps.log().mean().exp()  # rows have the size, columns are about 1
    return stored(rated, order, rows * size, columns * rated.steps / size)


def outline(info: LayerInfo, config: WatersicConfig) -> Weight:
    """The stored weight without data."""
    return outline_of(info, config, True)


METHOD = LayerMethod(
    name="watersic",
    command="quantize",
    summary="steps of columns by what their errors cost, errors moved into later ones, entropy-coded; calibrated",
    when="least bytes with calibration text at 4 bits and fewer, for readers of aicompress's own layout",
    config=WatersicConfig,
    needs=frozenset({"gram"}),
    apply=apply,
    outline=outline,
    check=check,
    describe=describe,
)
