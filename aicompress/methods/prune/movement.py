"""Movement pruning: the weights become zero that training has moved towards zero.

Sanh, Wolf and Rush 2020, arXiv:2005.07683, section 4: S = -Σ_t w g over the steps of a training run, positive where a
weight grew away from zero, whatever its size. The sums come from `aicompress distill --stats FILE`; prune the
checkpoint that this run wrote. Survivors are bit-exact.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from aicompress.errors import CompressError
from aicompress.layer import Layer
from aicompress.methods.decisions import Allocates
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.prune.masks.already_sparse import resolve_stored
from aicompress.methods.prune.masks.permutation import permuting
from aicompress.methods.prune.masks.sparsity import (
    SparsityConfig,
    check,
    choose,
    describe,
    masked,
    outline,
)
from aicompress.weights import Weight


class MovementConfig(SparsityConfig):
    """Parameters of movement."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"sparsity": 0.5},
                {"sparsity": 0.7, "scope": "row"},
                {"sparsity": 0.75, "block": "1x4"},
                {"pattern": "2:4", "store": "sparse"},
            ]
        }
    )

    name: Literal["movement"] = "movement"
    scope: Literal["layer", "row"] = Field("layer", description="what shares a sparsity: a layer, or each row of it")


def scores(layer: Layer, config: MovementConfig | None = None) -> Tensor:
    """-Σ w g, (out, in), raised so that the least is 0: that changes no order, not even of sums over blocks.

    Raises:
        CompressError: the layer was not trained, or its sums hold NaN or infinity.
    """
    if layer.movement is None:
        raise CompressError(f"{layer.info.name}: its movement is not known", "distill it with --stats FILE")
    if not torch.isfinite(layer.movement).all():
        raise CompressError(f"{layer.info.name}: its movement holds NaN or infinity", "train with a lower rate")
    raised = layer.movement.double() - layer.movement.double().min()
    return (raised / raised.mean().clamp_min(1e-300)).float()


def apply(layer: Layer, config: MovementConfig) -> Weight:
    """Prune one layer.

    Raises:
        CompressError: the layer was not trained.
    """
    return masked(layer, choose(layer, scores(layer), config), config)


METHOD = LayerMethod(
    name="movement",
    command="prune",
    summary="zero the weights that a distillation has moved towards zero; reads what `distill --stats` recorded",
    when="the end of a distillation or fine-tuning whose movement was recorded, at high shares of zeros",
    config=MovementConfig,
    needs=frozenset({"movement"}),
    apply=permuting(apply, scores),
    outline=outline,
    check=check,
    allocates=Allocates(resolve_stored),
    describe=describe,
)
