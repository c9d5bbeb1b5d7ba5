"""What methods share that prune against the Gram matrix of a layer's inputs: from a mask to the stored weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from aicompress.layer import Layer
from aicompress.methods.curvature import damped, gram
from aicompress.methods.prune.obs import LEAF
from aicompress.methods.prune.refit import refit
from aicompress.methods.prune.sparsity import SparsityConfig, masked, store
from aicompress.weights import IntGrouped, Weight

SWEEPS = 2  # passes of coordinate descent over integer codes


class CalibratedConfig(SparsityConfig):
    """Parameters of methods that know the Gram matrix."""

    refit: bool = Field(True, description="give the survivors their least-squares values")
    damping: float = Field(0.01, gt=0, le=1, description="added to the Gram matrix, as a part of its mean diagonal")


def finished(layer: Layer, mask: Tensor, config: CalibratedConfig, start: Tensor | None = None) -> Weight:
    """The stored weight for a mask.

    Args:
        layer: the layer.
        mask: (out, in) bool.
        config: whether to refit.
        start: the survivors' values, (out, in), where the method has moved them; None: the weight's own.
    """
    if not config.refit and start is None:
        return masked(layer, mask, config)
    hessian = damped(gram(layer), config.damping)
    if isinstance(layer.stored, IntGrouped):
        return recoded(layer.stored, mask, hessian.float())
    values = layer.weight if start is None else start
    if config.refit:
        values = refit(layer.weight, hessian.float(), mask & (layer.weight != 0), values)
    return store(layer, values.to(layer.info.dtype), mask, config)


def recoded(stored: IntGrouped, mask: Tensor, hessian: Tensor) -> IntGrouped:
    """An integer weight under a mask: survivors take other codes of the same grid that make up for what is gone.

    Coordinate descent from the masked codes: with all others fixed, the best value of column j is the one on its grid
    nearest to ŵ_j + ((W − Ŵ) H)_j / H_jj, so that no step can raise the loss.

    Args:
        stored: the weight W.
        mask: (out, in) bool.
        hessian: H, (in, in) float32, positive definite.
    """
    wanted = stored.dense().t().contiguous()  # (in, out): a column of the weight is contiguous
    stays, nearest = (mask & (stored.dense() != 0)).t(), grid(stored)
    values = wanted * stays
    pull = hessian @ (wanted - values)
    for first in list(range(0, len(values), LEAF)) * SWEEPS:
        last = min(len(values), first + LEAF)
        change = torch.zeros_like(values[first:last])
        for i in range(first, last):
            target = values[i] + pull[i] / hessian[i, i]
            change[i - first] = nearest(target, i) * stays[i] - values[i]
            values[i] += change[i - first]
            pull[first:last].addr_(hessian[first:last, i], change[i - first], alpha=-1)
        own = pull[first:last].clone()
        pull.addmm_(hessian[:, first:last], change, alpha=-1)
        pull[first:last] = own
    return encoded(values.t(), stored)


def grid(stored: IntGrouped) -> Callable[[Tensor, int], Tensor]:
    """(column, its number) -> the nearest values that the codes of a weight can take."""
    wide = stored.codes.shape[1] // stored.scale.shape[1]  # columns that share a scale
    half = 1 << (stored.bits - 1)
    scale = stored.scale.float()
    zero = torch.zeros_like(scale) if stored.zero is None else stored.zero.float()

    def nearest(column: Tensor, number: int) -> Tensor:
        step, shift = scale[:, number // wide], zero[:, number // wide]
        return ((column / step).round() + shift).clamp(-half, half - 1).sub(shift).mul(step)

    return nearest


def encoded(values: Tensor, stored: IntGrouped) -> IntGrouped:
    """Codes of values (out, in) that lie on the weight's grid."""
    groups = values.reshape(len(values), stored.scale.shape[1], -1)
    codes = (groups / stored.scale.float()[..., None]).round()
    if stored.zero is not None:
        codes = codes + stored.zero.float()[..., None]
    return replace(stored, codes=codes.reshape(values.shape).to(torch.int8))
