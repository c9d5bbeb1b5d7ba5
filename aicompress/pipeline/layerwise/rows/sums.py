"""What a block of rows adds to the row of its layer in the report."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TypeAlias

from aicompress.layer import Layer
from aicompress.measure import squared_sums
from aicompress.methods.capabilities import Rounded
from aicompress.methods.layerwise import AnyLayerMethod
from aicompress.pipeline.layerwise.report_rows import is_coarse
from aicompress.pipeline.step.layer_plan import LayerPlan
from aicompress.weights import Weight, outline_nbytes


@dataclass(frozen=True)
class ErrorSums:
    """What a block adds to its layer's row.

    Attributes:
        error: ‖W − Ŵ‖².
        norm: ‖W‖².
        seconds: in the method.
        coarse: whether its scales are.
        rounded: what rounding it in no more bytes would lose.
    """

    error: float = 0.0
    norm: float = 0.0
    seconds: float = 0.0
    coarse: bool = False
    rounded: Rounded | None = None


BySums: TypeAlias = dict[str, ErrorSums]  # by parameter, of a part of one by the layer's name


def key_of(job: LayerPlan) -> str:
    """What the sums of a layer go by."""
    return job.info.name if job.info.part else job.info.tensor


def compressed(method: AnyLayerMethod, job: LayerPlan, layer: Layer) -> tuple[Weight, ErrorSums]:
    """What a block of a layer's rows becomes."""
    start = time.perf_counter()
    weight = method.stored(layer, method.apply(layer, job.config), job.outline)
    seconds = time.perf_counter() - start
    assert job.outline is not None
    return weight, summed(method, job, layer, weight, outline_nbytes(job.outline), seconds)


def summed(
    method: AnyLayerMethod, job: LayerPlan, layer: Layer, weight: Weight, nbytes: int, seconds: float
) -> ErrorSums:
    """What a block of a layer's rows adds to its row.

    Args:
        method: gave the weight.
        job: the layer; for its block, where that has a config of its own.
        layer: the block.
        weight: what it became.
        nbytes: of the layer's weight, with its part of what layers share.
        seconds: in the method.
    """
    size = nbytes * layer.info.shape[0] // job.info.shape[0]  # the block's part of the layer's bytes
    rounded = method.rounded(layer, job.config, weight, size)
    return ErrorSums(*squared_sums(layer.weight, weight), seconds, is_coarse(weight), rounded)
