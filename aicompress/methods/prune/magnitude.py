"""Magnitude pruning: the weights of least |w| become zero, in a layer, a row, all layers, blocks or N:M groups.

Han et al. 2015 (arXiv:1506.02626); N:M after Mishra et al. 2021 (arXiv:2104.08378). Zeroing the least |w| is the mask
of least ‖W − Ŵ‖_F at its number of zeros. Survivors are bit-exact; an integer weight keeps its codes and scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from pydantic import ConfigDict
from torch import Tensor

from aicompress.layer import Layer, LayerInfo
from aicompress.methods.capabilities import Candidate, RowWise
from aicompress.methods.decisions import Allocates
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.prune.masks.already_sparse import resolve_stored
from aicompress.methods.prune.masks.global_threshold import by_blocks, share_globally
from aicompress.methods.prune.masks.masks import global_cut, parse_pattern, tile_sums
from aicompress.methods.prune.masks.permutation import permuting, pruned_in_order, regrouped
from aicompress.methods.prune.masks.sparsity import (
    SparsityConfig,
    check,
    choose,
    describe,
    keep_of,
    masked,
    outline,
    present,
    ranked,
)
from aicompress.weights import Masked, Weight
from aicompress.weights.grouping import LARGEST, word


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


class MagnitudeBlockConfig(MagnitudeConfig):
    """Parameters for some rows of a layer, with what all rows decide.

    Attributes:
        threshold: the bits of the least score that stays, of which `kept` are in these rows.
        order: (in,) the order of the inputs that N:M groups go by.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    threshold: int | None = None
    order: Tensor | None = None


def scores(layer: Layer, config: MagnitudeConfig) -> Tensor:
    """|w|, (out, in); w², which adds up, where blocks stay or go together."""
    return layer.weight.abs() if config.block is None else layer.weight.square()


def apply(layer: Layer, config: MagnitudeConfig) -> Weight:
    """Prune one layer, or some rows of one."""
    threshold = config.threshold if isinstance(config, MagnitudeBlockConfig) else None
    return masked(layer, choose(layer, scores(layer, config), config, threshold), config)


permuted = permuting(apply, scores)


def pruned(layer: Layer, config: MagnitudeConfig) -> Weight:
    """Prune one layer, or some rows of one, in the order of its inputs that its config asks for."""
    if isinstance(config, MagnitudeBlockConfig) and config.order is not None:
        return pruned_in_order(apply, layer, config, config.order)
    return permuted(layer, config)


def resolve(candidates: Sequence[Candidate[MagnitudeConfig]], other_bytes: int) -> list[MagnitudeConfig]:
    """Turn a global sparsity into the exact number of weights that stay in every layer; reads layers up to twice.

    Raises:
        RecipeError: several global sparsities, or a layer would be pruned away.
    """
    return share_globally(candidates, resolve_stored(candidates, other_bytes), by_blocks(scores))


def independent(config: MagnitudeConfig) -> bool:
    """Whether blocks of rows can be pruned apart: no tile spans two of them."""
    return 32 % config.tile[0] == 0


def multiple(config: MagnitudeConfig) -> int:
    """Rows whose groups of an N:M mask fill whole words, whatever the number of columns."""
    if config.pattern is None or config.store == "dense":
        return 1
    kept, size = parse_pattern(config.pattern)
    return word(kept, size)[1] if size <= LARGEST else 1


def divided(info: LayerInfo, blocks: Sequence[Callable[[], Layer]], config: MagnitudeConfig) -> list[MagnitudeConfig]:
    """A config for each block of rows: how many of the layer's survivors lie in it, or in which order its groups go.

    Reads blocks up to 3 times, for a number of survivors twice.
    """
    store = "sparse" if isinstance(outline(info, config), Masked) else "dense"
    config = config.model_copy(update={"store": store})
    keep = keep_of(info.shape, config)
    area = keep.tile[0] * keep.tile[1]
    if keep.group is not None and config.permutation:
        parts = [partial(_scores, read, config) for read in blocks]
        order = regrouped(parts, info.shape[0], *keep.group, config.permutation, blocks[0]().seed)
        return [MagnitudeBlockConfig.model_construct(**dict(config), order=order) for _ in blocks]
    if keep.group is not None:
        return [config.model_copy() for _ in blocks]  # so many bytes of a mask are no share of the whole's
    if keep.per_row or not keep.kept:
        return [config] * len(blocks)

    def tiles(read: Callable[[], Layer]) -> Tensor:
        layer = read()
        return tile_sums(ranked(scores(layer, config), present(layer)), keep.tile)

    found = global_cut([partial(tiles, read) for read in blocks], keep.kept // area)
    given = {**dict(config), "sparsity": None, "threshold": found.threshold}
    return [MagnitudeBlockConfig.model_construct(**{**given, "kept": count * area}) for count in found.counts]


def _scores(read: Callable[[], Layer], config: MagnitudeConfig) -> Tensor:
    return scores(read(), config)


METHOD = LayerMethod(
    name="magnitude",
    command="prune",
    summary="zero the weights of least magnitude, per layer, row, globally, in blocks or N:M; data-free",
    when="no data, or zeros to start a training from; with calibration text sparsegpt and alps lose far less",
    config=MagnitudeConfig,
    apply=pruned,
    outline=outline,
    stacks=True,
    row_wise=RowWise(independent, divided=divided, multiple=multiple),
    check=check,
    allocates=Allocates(resolve),
    describe=describe,
)
