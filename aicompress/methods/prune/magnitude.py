"""Magnitude pruning: the weights of least |w| become zero, in a layer, a row, all layers, blocks or N:M groups.

Han et al. 2015 (arXiv:1506.02626); N:M after Mishra et al. 2021 (arXiv:2104.08378). Zeroing the least |w| is the mask
of least ‖W − Ŵ‖_F at its number of zeros. Survivors are bit-exact; an integer weight keeps its codes and scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import ConfigDict
from torch import Tensor

from aicompress.layer import Layer
from aicompress.methods.capabilities import Allocates, Candidate
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.prune.masks.global_threshold import share_globally
from aicompress.methods.prune.masks.permutation import permuting
from aicompress.methods.prune.masks.sparsity import (
    SparsityConfig,
    check,
    choose,
    describe,
    masked,
    outline,
    resolve_stored,
)
from aicompress.weights import Weight


class MagnitudeConfig(SparsityConfig):
    """Parameters of magnitude."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"sparsity": 0.5},
                {"sparsity": 0.7, "scope": "row"},
                {"sparsity": 0.5, "scope": "global"},
                {"sparsity": 0.75, "block": "1x4"},
                {"sparsity": 0.9, "store": "sparse"},
                {"pattern": "2:4", "store": "auto"},
                {"pattern": "2:4", "permutation": 5, "store": "sparse"},
                {"kept": 3, "store": "sparse"},
            ]
        }
    )

    name: Literal["magnitude"] = "magnitude"


def scores(layer: Layer, config: MagnitudeConfig) -> Tensor:
    """|w|, (out, in); w², which adds up, where blocks stay or go together."""
    return layer.weight.abs() if config.block is None else layer.weight.square()


def apply(layer: Layer, config: MagnitudeConfig) -> Weight:
    """Prune one layer."""
    return masked(layer, choose(layer, scores(layer, config), config), config)


def resolve(candidates: Sequence[Candidate[MagnitudeConfig]], other_bytes: int) -> list[MagnitudeConfig]:
    """Turn a global sparsity into the exact number of weights that stay in every layer; reads layers up to 3 times.

    Raises:
        RecipeError: several global sparsities, or a layer would be pruned away.
    """
    return share_globally(candidates, resolve_stored(candidates, other_bytes), scores)


METHOD = LayerMethod(
    name="magnitude",
    command="prune",
    summary="zero the weights of least magnitude, per layer, row, globally, in blocks or N:M; data-free",
    when="no data, or zeros to start a training from; with calibration text sparsegpt and alps lose far less",
    config=MagnitudeConfig,
    apply=permuting(apply, scores),
    outline=outline,
    stacks=True,
    check=check,
    allocates=Allocates(resolve),
    describe=describe,
)
