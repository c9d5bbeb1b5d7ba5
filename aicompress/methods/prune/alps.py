"""ALPS: the mask and the survivors together, by ADMM on the layer's output error.

Meng et al. 2024, arXiv:2406.07831, algorithm 1: min tr((W − Ŵ) H (W − Ŵ)ᵀ) over masks of a given size is split into a
dense least-squares problem and a projection onto the largest entries, tied by a penalty ρ that grows; then the
survivors are refitted (section 3.2). Inputs are scaled to H_jj = 1 first (section 3.3). Here ρ grows in stages, so
that one Cholesky factorization serves all iterations of a stage and an iteration is one product with
B = ρ (H + ρ I)⁻¹.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from aicompress.layer import Layer
from aicompress.methods.capabilities import Batched, Reads
from aicompress.methods.curvature import damped, invert, over, raw_gram, shifted
from aicompress.methods.decisions import Allocates
from aicompress.methods.effort import Effort, Level, one_pass
from aicompress.methods.layerwise import LayerMethod, stacks
from aicompress.methods.prune.masks.calibrated import (
    CalibratedConfig,
    SurvivorAim,
    check,
    describe,
    finished,
    outline,
    resolve,
    saliency,
)
from aicompress.methods.prune.masks.masks import Keep, tile_sums
from aicompress.methods.prune.masks.permutation import permuting, permuting_together
from aicompress.methods.prune.masks.sparsity import choose, keep_of, present
from aicompress.methods.prune.masks.survey import surveying
from aicompress.weights import Weight

SAMPLE = 1 << 14  # scores from which a threshold is estimated between iterations
ACCURACY = 1e-2  # of an inverse


class AlpsConfig(CalibratedConfig):
    """Parameters of alps."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"sparsity": 0.5},
                {"sparsity": 0.5, "scope": "row", "refit": False},
                {"sparsity": 0.75, "block": "4x1"},
                {"pattern": "2:4", "store": "sparse"},
                {"sparsity": 0.9, "store": "auto", "stages": 2},
            ]
        }
    )

    name: Literal["alps"] = "alps"
    scope: Literal["layer", "row"] = Field("layer", description="what shares a sparsity: a layer, or each row of it")
    stages: int = Field(7, ge=1, le=30, description="values of the penalty, from penalty[0] up to penalty[1]")
    iterations: int = Field(3, ge=1, le=100, description="iterations at each penalty")
    penalty: tuple[float, float] = Field((0.02, 1.28), description="first and last penalty ρ, for inputs of variance 1")


def penalties(config: AlpsConfig) -> list[float]:
    """ρ of each stage, geometric from the first to the last."""
    first, last = config.penalty
    steps = max(1, config.stages - 1)
    return [first * (last / first) ** (stage / steps) for stage in range(config.stages)]


def apply(layer: Layer, config: AlpsConfig) -> Weight:
    """Prune one layer.

    Raises:
        CompressError: no calibration token reached the layer, or its Gram matrix is not one.
    """
    return together([layer], config)[0]


def together(layers: Sequence[Layer], config: AlpsConfig) -> list[Weight]:
    """Prune layers in the order of their common inputs: one factorization for each penalty, and one product a step."""
    hessian = damped(raw_gram(layers[0]), config.damping)  # (in, in) float64
    targets = [shifted(layer, config.shift, over(hessian)) for layer in layers]
    deviation = hessian.diagonal().sqrt()
    plain = hessian.float()
    scaled = hessian.div_(deviation).div_(deviation[:, None])
    deviation = deviation.float()
    weights: list[Weight] = []
    for stack in stacks(layers):
        aims = [SurvivorAim(target, plain) for target in targets[len(weights) : len(weights) + len(stack)]]
        roughs = [Rough.of(layer, config) for layer in stack]
        values = split(torch.cat([aim.target for aim in aims]) * deviation, scaled, roughs, config)
        parts = torch.split(values, [len(aim.target) for aim in aims])
        for layer, aim, part in zip(stack, aims, parts, strict=True):
            mask = choose(layer, part.square(), config)
            weights.append(finished(layer, mask, config, part * mask / deviation, aim))
    return weights


def split(wanted: Tensor, hessian: Tensor, roughs: Sequence[Rough], config: AlpsConfig) -> Tensor:
    """Scaled weights (out, in) whose largest entries are the mask, after all stages.

    Args:
        wanted: scaled weights of layers below each other, (out, in) float32.
        hessian: (in, in) float64 with a diagonal of ones.
        roughs: of each layer, what stays.
        config: the stages.
    """
    rows = [len(rough.there) for rough in roughs]

    def largest(values: Tensor) -> Tensor:
        parts = zip(roughs, torch.split(values, rows), strict=True)
        return values * torch.cat([rough.mask(part) for rough, part in parts])

    sparse = largest(wanted)
    dual = torch.zeros_like(wanted)
    before = config.penalty[0]
    both = wanted
    for penalty in penalties(config):
        product = pull(hessian, penalty)
        dual.mul_(before / penalty)
        for _ in range(config.iterations):
            both = torch.addmm(wanted + dual, sparse.sub_(dual).sub_(wanted), product)
            sparse = largest(both)
            dual = both - sparse
        before = penalty
    return both


def pull(hessian: Tensor, penalty: float) -> Tensor:
    """B = ρ (H + ρ I)⁻¹, (in, in) float32; factorized in float32 where that leaves two digits or more.

    With a diagonal of ones no eigenvalue of H is above the number of inputs, so the condition number is at most that
    over ρ.
    """
    accurate = len(hessian) / penalty * torch.finfo(torch.float32).eps < ACCURACY
    shifted = hessian.to(torch.float32 if accurate else torch.float64, copy=True)
    shifted.diagonal().add_(penalty)
    return invert(shifted).mul_(penalty).float()


@dataclass(frozen=True)
class Rough:
    """Masks between iterations: where a whole layer competes, by a threshold estimated from a part of it.

    Attributes:
        keep: what stays.
        there: (out, in) bool, the weights that may stay.
        whole: all of them may.
    """

    keep: Keep
    there: Tensor
    whole: bool

    @classmethod
    def of(cls, layer: Layer, config: AlpsConfig) -> Rough:
        """Of a layer."""
        there = present(layer)
        return cls(keep_of(layer.info.shape, config), there, bool(there.all()))

    def mask(self, values: Tensor) -> Tensor:
        """True for the largest of the values (out, in), as many as stay or nearly so."""
        scores = values.square() if self.whole else torch.where(self.there, values.square(), 0.0)
        mask = self._mask(scores)
        return mask if self.whole else mask & self.there

    def _mask(self, scores: Tensor) -> Tensor:
        keep = self.keep
        if keep.group == (2, 4):
            return two_of_four(scores)
        if keep.group is not None or keep.per_row:
            return keep.mask(scores)
        tiles = tile_sums(scores, keep.tile)
        flat = tiles.reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLE) | 1]
        area = keep.tile[0] * keep.tile[1]
        dropped = round(len(sample) * (1 - keep.kept / (flat.numel() * area)))
        if dropped == 0:
            return torch.ones_like(self.there)
        mask = tiles > sample.kthvalue(dropped).values
        return mask if area == 1 else mask.repeat_interleave(keep.tile[0], 0).repeat_interleave(keep.tile[1], 1)


def two_of_four(scores: Tensor) -> Tensor:
    """True for the two largest of every four inputs, and for what equals the second of them."""
    fours = scores.reshape(-1, 4)
    left, right = torch.minimum(fours[:, ::2], fours[:, 1::2]).unbind(1)  # the lesser one of each pair
    first, second = torch.maximum(fours[:, ::2], fours[:, 1::2]).unbind(1)
    threshold = torch.maximum(torch.minimum(first, second), torch.maximum(left, right))
    return (fours >= threshold[:, None]).reshape(scores.shape)


EFFORTS: dict[Level, Effort] = {
    "fast": Effort(
        "one forward pass over the calibration data, of the original model, and half as many iterations",
        lambda given: {"stages": 3, "penalty": (0.04, 0.64)},
        calibration=one_pass,
    ),
    "balanced": Effort("two forward passes", lambda given: {}),
}

permuted = permuting(apply, saliency)

METHOD = LayerMethod(
    name="alps",
    command="prune",
    summary="mask and survivors together by ADMM on the layer's output error; best of the calibrated ones",
    when="calibration text: the least loss at one share of zeros for all layers, or N:M",
    config=AlpsConfig,
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
