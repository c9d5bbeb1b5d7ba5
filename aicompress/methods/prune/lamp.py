"""LAMP: one threshold for all layers, on scores that say how much of its layer's rest a weight is.

Lee et al. 2021, arXiv:2010.07611, equation 4: w² / Σ v² over the layer's weights v with v² ≥ w². Within a layer the
order is that of |w|, so that only each layer's number of survivors differs from magnitude pruning; the largest weight
of a layer has score 1, so that no layer can be pruned away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from aicompress.layer import Layer, LayerInfo
from aicompress.methods.capabilities import Allocates, Candidate, RowWise
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.prune import magnitude
from aicompress.methods.prune.masks.global_threshold import share_globally
from aicompress.methods.prune.masks.sparsity import SparsityConfig, check, describe, outline, resolve_stored
from aicompress.methods.zeros import mask_of
from aicompress.weights import Weight

PIECE = 1 << 20  # squares in float64 at a time


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
    """w² / Σ_{v² ≥ w²} v², (out, in) in [0, 1], in ascending order; equal weights count one after the other.

    A threshold on all layers' scores asks how many of each are above it, not where they are. Of a sparse layer, whose
    zeros do not compete, each score lies where its weight does.
    """
    flat = layer.weight.reshape(-1).abs()
    if mask_of(layer.stored) is None:
        flat.numpy().sort()  # in place, and without the places, which take twice the weights' own memory
        return shares(flat).reshape(layer.weight.shape)
    sizes, places = flat.sort(stable=True)
    return torch.empty_like(flat).scatter_(0, places, shares(sizes)).reshape(layer.weight.shape)


def shares(sizes: Tensor) -> Tensor:
    """What each square is of the sum of those from it on; sizes (n,) ascending, whose memory the shares take."""
    above = 0.0
    for end in range(len(sizes), 0, -PIECE):
        piece = sizes[max(0, end - PIECE) : end]
        squares = piece.flip(0).double().square_()
        rest = squares.clone()
        rest[0] += above
        above = float(rest.cumsum_(0)[-1])
        piece.copy_(squares.div_(rest).nan_to_num_(0.0).flip(0))  # 0 / 0 where nothing but zeros is left
    return sizes


def apply(layer: Layer, config: LampConfig) -> Weight:
    """Prune one layer to its number of survivors."""
    return magnitude.apply(layer, _by_size(config))


def _by_size(config: LampConfig) -> magnitude.MagnitudeConfig:
    """The same number of survivors for magnitude; of a block of rows it may be 0."""
    return magnitude.MagnitudeConfig(kept=1, store=config.store).model_copy(update={"kept": config.kept})


def divided(info: LayerInfo, blocks: Sequence[Callable[[], Layer]], config: LampConfig) -> list[LampConfig]:
    """A config for each block of rows: how many of the layer's survivors lie in it."""
    parts = magnitude.divided(info, blocks, _by_size(config))
    return [config.model_copy(update={"kept": part.kept, "store": part.store}) for part in parts]


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
    row_wise=RowWise(lambda config: True, divided=divided),
    allocates=Allocates(resolve),
    describe=describe,
)
