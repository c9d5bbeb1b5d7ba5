"""SparseGPT: zero weights column by column, each error moved into the columns not yet pruned.

Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1: the mask of every 128 columns takes the weights of least
w² / [H⁻¹]_jj at their turn, N:M that of every M columns. With `refit` the survivors then take their least-squares
values given the mask, which the column order has kept the early ones from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from aicompress.layer import Layer
from aicompress.methods.capabilities import Batched, Candidate, Reads
from aicompress.methods.curvature import inverse_factor, raw_gram, shifted
from aicompress.methods.decisions import Allocates
from aicompress.methods.effort import Effort, Level, one_pass
from aicompress.methods.layerwise import LayerMethod, stacks
from aicompress.methods.prune.masks.already_sparse import counted
from aicompress.methods.prune.masks.calibrated import (
    CalibratedConfig,
    SurvivorAim,
    check,
    describe,
    finished,
    outline,
    require_reachable,
    saliency,
)
from aicompress.methods.prune.masks.obs import Choose, PruningSweep
from aicompress.methods.prune.masks.permutation import permuting, permuting_together
from aicompress.methods.prune.masks.sparsity import keep_of, present, ranked
from aicompress.methods.prune.masks.survey import surveying
from aicompress.methods.zeros import mask_of
from aicompress.weights import Weight

SPAN = 128  # columns that share a mask


class SparsegptConfig(CalibratedConfig):
    """Parameters of sparsegpt."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"sparsity": 0.5},
                {"sparsity": 0.5, "refit": False},
                {"sparsity": 0.75, "block": "4x1"},
                {"pattern": "2:4", "store": "sparse"},
                {"sparsity": 0.9, "store": "auto"},
            ]
        }
    )

    name: Literal["sparsegpt"] = "sparsegpt"
    scope: Literal["layer", "row"] = Field("layer", description="what shares a sparsity: a layer, or each row of it")


def span_of(config: SparsegptConfig) -> int:
    """Columns that share a mask: those of one N:M group, or 128, widened to whole blocks."""
    if config.pattern is not None:
        return int(config.pattern.split(":")[1])
    wide = config.tile[1]
    return -(-SPAN // wide) * wide


def chooser(layer: Layer, config: SparsegptConfig) -> Choose:
    """Masks of spans that in all keep what the layer keeps; spans share it by the weights that they have."""
    keep, there = keep_of(layer.info.shape, config), present(layer)
    rows, columns = there.shape
    stored = mask_of(layer.stored)
    by_weights = stored is not None and config.scope == "layer" and config.block is None
    before = torch.arange(columns + 1)
    if by_weights:
        before = torch.cat([torch.zeros(1, dtype=torch.int64), there.sum(dim=0).cumsum(0)])

    def choose(scores: Tensor, first: int) -> Tensor:
        last = first + scores.shape[1]
        part = keep.part(rows, int(before[first]), int(before[last]), int(before[-1]))
        mask = part.mask(ranked(scores, there[:, first:last]))
        return mask if stored is None else mask & there[:, first:last]

    return choose


def survivors(candidate: Candidate[SparsegptConfig]) -> int:
    """How many weights of an already sparse layer stay: no score changes it."""
    layer, config = candidate.read(), candidate.config
    choose, span, columns = chooser(layer, config), span_of(config), layer.weight.shape[1]
    ones = torch.ones(layer.weight.shape)
    return sum(int(choose(ones[:, first : first + span], first).sum()) for first in range(0, columns, span))


def resolve(candidates: Sequence[Candidate[SparsegptConfig]], other_bytes: int) -> list[SparsegptConfig]:
    """How many weights of already sparse layers stay, which only their masks tell; bytes that a search can keep to."""
    require_reachable(candidates, other_bytes)
    return counted(candidates, survivors)


def apply(layer: Layer, config: SparsegptConfig) -> Weight:
    """Prune one layer.

    Raises:
        CompressError: no calibration token reached the layer, or its Gram matrix is not one.
    """
    return together([layer], config)[0]


def together(layers: Sequence[Layer], config: SparsegptConfig) -> list[Weight]:
    """Prune layers in the order of their common inputs: one factorization, and the columns of all in turn."""
    gram = raw_gram(layers[0])
    exact, diagonal = inverse_factor(gram, config.damping)
    factor = exact.float()
    del exact
    hessian = gram.to(torch.float32, copy=True)
    hessian.diagonal().copy_(diagonal)
    weights: list[Weight] = []
    for stack in stacks(layers):
        aims = [
            SurvivorAim(shifted(layer, config.shift, lambda x: x @ factor.t() @ factor), hessian) for layer in stack
        ]
        rows = [len(aim.target) for aim in aims]
        there = torch.cat([present(layer) for layer in stack])
        sweep = PruningSweep(factor, beside([chooser(layer, config) for layer in stack], rows), there, span_of(config))
        values, masks = (torch.split(part, rows) for part in sweep.run(torch.cat([aim.target for aim in aims])))
        parts = zip(stack, masks, values, aims, strict=True)
        weights += [finished(layer, mask, config, value, aim) for layer, mask, value, aim in parts]
    return weights


def beside(choosers: Sequence[Choose], rows: list[int]) -> Choose:
    """Masks of layers that lie below each other."""

    def choose(scores: Tensor, first: int) -> Tensor:
        parts = zip(choosers, torch.split(scores, rows), strict=True)
        return torch.cat([one(part, first) for one, part in parts])

    return choosers[0] if len(choosers) == 1 else choose


EFFORTS: dict[Level, Effort] = {
    "fast": Effort(
        "one forward pass over the calibration data, of the original model", lambda given: {}, calibration=one_pass
    ),
    "balanced": Effort("two forward passes", lambda given: {}),
}

permuted = permuting(apply, saliency)

METHOD = LayerMethod(
    name="sparsegpt",
    command="prune",
    summary="zero weights column by column and move each error into the columns to come; survivors refitted",
    when="calibration text: half of the weights, or N:M, columns permuted for less loss; alps keeps a little more",
    config=SparsegptConfig,
    needs=frozenset({"gram"}),
    apply=permuted,
    reading=Reads(shift=lambda config: config.shift),
    batched=Batched(permuting_together(permuted, together)),
    outline=outline,
    check=check,
    allocates=Allocates(resolve),
    describe=describe,
    surveys=surveying(permuted, saliency),
    efforts=EFFORTS,
)
