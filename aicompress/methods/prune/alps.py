"""ALPS: the mask and the survivors together, by ADMM on the layer's output error.

Meng et al. 2024, arXiv:2406.07831, algorithm 1: min tr((W − Ŵ) H (W − Ŵ)ᵀ) over masks of a given size is split into a
dense least-squares problem and a projection onto the largest entries, tied by a penalty ρ that grows; then the
survivors are refitted (section 3.2). Inputs are scaled to H_jj = 1 first (section 3.3). Here ρ grows in stages, so
that one Cholesky factorization serves all iterations of a stage and an iteration is one product with
B = ρ (H + ρ I)⁻¹.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from aicompress.layer import Layer
from aicompress.methods.curvature import damped, moments, over, shifted
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.prune.calibrated import (
    CalibratedConfig,
    check,
    describe,
    finished,
    outline,
    saliency,
    settle,
    surveys,
)
from aicompress.methods.prune.masks import Keep, tile_sums
from aicompress.methods.prune.permutation import permuting
from aicompress.methods.prune.sparsity import choose, keep_of, present
from aicompress.weights import Weight

SAMPLE = 1 << 14  # scores from which a threshold is estimated between iterations


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
    hessian = damped(moments(layer), config.damping)  # (in, in) float64
    deviation = hessian.diagonal().sqrt()
    wanted = shifted(layer, config.shift, over(hessian)) * deviation.float()
    found = split(wanted, hessian / deviation / deviation[:, None], present(layer), layer, config)
    mask = choose(layer, found.square(), config)
    return finished(layer, mask, config, found * mask / deviation.float())


def split(wanted: Tensor, hessian: Tensor, there: Tensor, layer: Layer, config: AlpsConfig) -> Tensor:
    """Scaled weights (out, in) whose largest entries are the mask, after all stages.

    Args:
        wanted: scaled weights, (out, in) float32.
        hessian: (in, in) float64 with a diagonal of ones.
        there: (out, in) bool, the weights that may stay.
        layer, config: what stays.
    """
    keep = keep_of(layer.info.shape, config)
    eye = torch.eye(len(hessian), dtype=hessian.dtype)
    sparse = wanted * roughly(wanted, keep, there)
    dual = torch.zeros_like(wanted)
    before = config.penalty[0]
    both = wanted
    for penalty in penalties(config):
        product = torch.cholesky_inverse(torch.linalg.cholesky(hessian + penalty * eye)).mul_(penalty).float()
        dual.mul_(before / penalty)
        for _ in range(config.iterations):
            both = wanted + (sparse - dual - wanted) @ product + dual
            sparse = both * roughly(both, keep, there)
            dual = both - sparse
        before = penalty
    return both


def roughly(values: Tensor, keep: Keep, there: Tensor) -> Tensor:
    """The mask of the largest values; where a whole layer competes, by a threshold estimated from a part of them."""
    scores = torch.where(there, values.square(), 0.0)
    if keep.group is not None or keep.per_row:
        return keep.mask(scores).logical_and_(there)
    tiles = tile_sums(scores, keep.tile)
    flat = tiles.reshape(-1)
    sample = flat[:: max(1, flat.numel() // SAMPLE) | 1]
    area = keep.tile[0] * keep.tile[1]
    dropped = round(len(sample) * (1 - keep.kept / (flat.numel() * area)))
    if dropped == 0:
        return there
    mask = tiles > sample.kthvalue(dropped).values
    return mask if area == 1 else mask.repeat_interleave(keep.tile[0], 0).repeat_interleave(keep.tile[1], 1) & there


METHOD = LayerMethod(
    name="alps",
    command="prune",
    summary="mask and survivors together by ADMM on the layer's output error; best of the calibrated ones",
    config=AlpsConfig,
    needs=frozenset({"gram"}),
    apply=permuting(apply, saliency),
    outline=outline,
    check=check,
    settle=settle,
    describe=describe,
    compares=lambda config: config.shift > 0,
    surveys=surveys,
    scores=saliency,
)
