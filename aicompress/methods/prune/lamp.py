"""LAMP: one threshold for all layers, on scores that say how much of its layer's rest a weight is.

Lee et al. 2021, arXiv:2010.07611, equation 4: w² / Σ v² over the layer's weights v with v² ≥ w². Within a layer the
order is that of |w|, so that only each layer's number of survivors differs from magnitude pruning; the largest weight
of a layer has score 1, so that no layer can be pruned away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from aicompress.layer import Layer
from aicompress.methods.capabilities import Allocates, Candidate
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.prune import magnitude
from aicompress.methods.prune.masks.global_threshold import share_globally
from aicompress.methods.prune.masks.sparsity import SparsityConfig, check, describe, outline, resolve_stored
from aicompress.weights import Weight


class LampConfig(SparsityConfig):
    """Parameters of lamp."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"sparsity": 0.5}, {"sparsity": 0.9, "store": "sparse"}]})
    one_of: ClassVar[tuple[str, ...]] = ("sparsity", "kept")

    name: Literal["lamp"] = "lamp"
    scope: Literal["global"] = Field("global", description="all selected layers share one sparsity")
    pattern: None = Field(None, description="not for lamp, whose layers keep different shares")
    permutation: Literal[0] = Field(0, description="not for lamp, which has no patterns")
    block: None = Field(None, description="not for lamp, whose scores do not add up")


def scores(layer: Layer, config: LampConfig) -> Tensor:
    """w² / Σ_{v² ≥ w²} v², (out, in) in (0, 1]; equal weights count in row-major order."""
    squares = layer.weight.reshape(-1).double().square()
    ordered = squares.sort(stable=True)
    rest = ordered.values.flip(0).cumsum(0).flip(0)
    scores = torch.zeros_like(squares)
    scores[ordered.indices] = torch.where(rest > 0, ordered.values / rest, 0.0)
    return scores.float().reshape(layer.weight.shape)


def apply(layer: Layer, config: LampConfig) -> Weight:
    """Prune one layer to its number of survivors."""
    return magnitude.apply(layer, magnitude.MagnitudeConfig(kept=config.kept, store=config.store))


def resolve(candidates: Sequence[Candidate[LampConfig]], other_bytes: int) -> list[LampConfig]:
    """Every layer's number of survivors; reads layers up to 3 times.

    Raises:
        RecipeError: several sparsities.
    """
    return share_globally(candidates, resolve_stored(candidates, other_bytes), scores)


METHOD = LayerMethod(
    name="lamp",
    command="prune",
    summary="zero the least weights under one threshold on layer-normalised scores; data-free",
    when="no data, and layers that should lose unlike shares: one threshold for all of them",
    config=LampConfig,
    apply=apply,
    outline=outline,
    check=check,
    allocates=Allocates(resolve),
    describe=describe,
)
