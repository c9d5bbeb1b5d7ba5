"""Rate-distortion quantization: every weight takes the code of least error plus what it costs in bits.

One step for the whole layer, found so that its codes take `target_bpw` bits per weight once they are entropy-coded, and
codes of least h_j (w − ŵ)² + λ R(q), as DeepCABAC chooses them (Wiedemann et al. 2020, arXiv:1907.11900, section III).
h_j is the mean square of an input, or 1 without calibration. Zero is a code like any other: what is small enough
vanishes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from aicompress.layer import Layer, LayerInfo
from aicompress.methods.capabilities import Reads, RowWise
from aicompress.methods.curvature import importance
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.quantize.grid.rated import (
    Problem,
    RatedConfig,
    RatedRounding,
    bits_of_codes,
    check,
    describe,
    rated_codes,
    stored,
)
from aicompress.methods.quantize.grid.rated import outline as outline_of
from aicompress.methods.quantize.grid.rated_rows import rated_rows, shared_scheme
from aicompress.methods.quantize.grid.refitting import refitted
from aicompress.weights import Weight
from aicompress.weights.stored.trellis import BLOCK


class RdoConfig(RatedConfig):
    """Parameters of rdo."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"target_bpw": 2.0, "weighted": True}]})

    name: Literal["rdo"] = "rdo"
    weighted: bool = Field(False, description="errors count by the mean squares of the inputs, which takes calibration")


class RdoBlockConfig(RdoConfig):
    """Parameters for some rows of a layer, with how all of them are rounded."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    scheme: RatedRounding


def apply(layer: Layer, config: RdoConfig) -> Weight:
    """Quantize one layer.

    Raises:
        CompressError: no calibration token reached a layer whose errors are weighted.
    """
    wanted = layer.weight.t().contiguous()
    weight = torch.ones(len(wanted))
    if isinstance(config, RdoBlockConfig):
        rated = rated_rows(layer.weight, config.scheme, config)
    else:
        if config.weighted:
            squares = importance(layer)
            weight = squares / squares.mean().clamp_min(1e-30) + 1e-3
        problem = Problem(wanted, None, weight, None)
        rated = rated_codes(problem, bits_of_codes(layer.info, config, False), config)
    root = weight.sqrt()[:, None]
    rows, _ = refitted(wanted * root, None, rated.values * root, False)
    return stored(rated, torch.arange(len(wanted)), rows * rated.coarser * rated.steps[0], None)


def divided(info: LayerInfo, blocks: Sequence[Callable[[], Layer]], config: RdoConfig) -> list[RdoConfig]:
    """A config for all blocks of rows, with the step and the code lengths of the whole layer; reads blocks again."""
    scheme = shared_scheme(
        [partial(_weight, read) for read in blocks], info.shape, bits_of_codes(info, config, False), config
    )
    return [RdoBlockConfig.model_construct(**dict(config), scheme=scheme)] * len(blocks)


def _weight(read: Callable[[], Layer]) -> Tensor:
    return read().weight


def multiple(config: RdoConfig) -> int:
    """Rows after which the states of a trellis start anew."""
    return BLOCK if config.quantizer == "trellis" else 1


def outline(info: LayerInfo, config: RdoConfig) -> Weight:
    """The stored weight without data."""
    return outline_of(info, config, False)


METHOD = LayerMethod(
    name="rdo",
    command="quantize",
    summary="one step, codes of least error and bits, entropy-coded; data-free",
    when="least bytes without data: codes take the bits that a target gives them, 2.37 as well as 3",
    config=RdoConfig,
    needs=frozenset({"norms"}),
    reading=Reads(statistics=lambda config: frozenset({"norms"} if config.weighted else ())),
    apply=apply,
    row_wise=RowWise(lambda config: not config.weighted, divided=divided, multiple=multiple, exact=False),
    outline=outline,
    check=check,
    describe=describe,
)
