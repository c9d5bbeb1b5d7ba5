"""What methods share that prune against the Gram matrix of a layer's inputs: from a mask to the stored weight."""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from aicompress.layer import Layer
from aicompress.methods.curvature import damped, gram, inverse_factor
from aicompress.methods.prune.obs import Round, Sweep
from aicompress.methods.prune.refit import refit
from aicompress.methods.prune.sparsity import SparsityConfig, masked, store
from aicompress.weights import IntGrouped, Weight

SPAN = 128  # columns whose mask is chosen together


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
        return rounded(layer, mask, inverse_factor(hessian).float())
    values = layer.weight if start is None else start
    if config.refit:
        values = refit(layer.weight, hessian.float(), mask & (layer.weight != 0), values)
    return store(layer, values.to(layer.info.dtype), mask, config)


def rounded(layer: Layer, mask: Tensor, factor: Tensor) -> IntGrouped:
    """An integer weight under a mask: its survivors take other codes of the same grid that make up for the rest."""
    stored = layer.stored
    assert isinstance(stored, IntGrouped)

    def given(scores: Tensor, first: int) -> Tensor:
        return mask[:, first : first + scores.shape[1]]

    sweep = Sweep(factor, given, layer.weight != 0, SPAN, grid(stored))
    return encoded(sweep.run(layer.weight)[0], stored)


def grid(stored: IntGrouped) -> Round:
    """Rounds a column to the nearest values that the codes of a weight can take."""
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
